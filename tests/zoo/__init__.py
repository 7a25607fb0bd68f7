"""The sweep over every model: ``pytest -m zoo`` runs it, ``python tests/zoo/report.py`` renders it.

``catalogue`` names the models; ``torch_stage`` and ``onnx_stage`` check one each;
``sweep`` runs them in processes of their own, with a time limit; ``results`` keeps and
judges the rows.
"""
