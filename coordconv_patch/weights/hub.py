"""Coordinate weights in the layout of the Hugging Face Hub: a folder, or a repository.

A folder has ``model.safetensors`` (what :func:`coordconv_patch.save_coords` writes, which alone
says what is needed to load it), ``config.json`` for programs and ``README.md``, a model card, for
people. Nothing but the Hub itself needs the package huggingface_hub.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import nn

from coordconv_patch.arguments import check_flag, check_path, check_text, given
from coordconv_patch.display.shown import Shown
from coordconv_patch.errors import ArgumentError, WeightsError, excerpt, first_line
from coordconv_patch.files.atomic import os_errors_reported, replacement
from coordconv_patch.running.inputs import check_is_module
from coordconv_patch.running.untouched import Model
from coordconv_patch.running.wrappers import unwrapped
from coordconv_patch.status import LayerStatus, layer_status
from coordconv_patch.version import __version__
from coordconv_patch.weights.model_card import model_card
from coordconv_patch.weights.save_load import fingerprint, load_coords, save_coords

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained"]

_WEIGHTS, _CONFIG, _CARD = "model.safetensors", "config.json", "README.md"


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    base_model: str = "",
    report: Shown | None = None,
    include_batch_norm: bool = False,
    repository: str = "OWNER/NAME",
) -> Path:
    """Write the coordinate weights of a patched model as a folder in the Hub's layout.

    The folder is made if there is none. A ``README.md`` that is there already is left alone.

    Args:
        model: A patched model.
        folder: The folder.
        base_model: The Hub's repository of the model that was patched, such as
            ``"timm/resnet50.a1_in1k"``, for the model card and ``config.json``.
        report: Shown in the model card, such as what ``export_onnx`` returned.
        include_batch_norm: See :func:`coordconv_patch.save_coords`.
        repository: The name under which the card says that the weights are to be loaded.

    Returns:
        The folder.

    Raises:
        WeightsError: As :func:`coordconv_patch.save_coords`; or if the folder cannot be written.
            Nothing is written then.
        ArgumentError: If another argument makes no sense.

    Example:
        >>> import tempfile
        >>> import coordconv_patch as ccp
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = ccp.save_pretrained(ccp.patch(net), folder)
        ...     again = ccp.from_pretrained(net, folder)
        >>> len(ccp.coord_parameters(again))
        1
    """
    check_is_module(model)
    folder = check_path("folder", folder)
    check_text("base_model", base_model, "timm/resnet50.a1_in1k")
    check_text("repository", repository, "OWNER/NAME")
    check_flag("include_batch_norm", include_batch_norm)
    _check_report(report)
    layers = layer_status(unwrapped(model))
    if not layers:
        save_coords(model, folder / _WEIGHTS)  # refuses, and says why
    base = fingerprint(unwrapped(model))
    card = model_card(layers, base, base_model=base_model, repository=repository, report=report)
    with _made(folder), ExitStack() as written:
        # The weights last, as they may be refused; and every file takes its place after they did,
        # so that no old one is left beside a new one.
        if not (folder / _CARD).exists():
            _write(folder / _CARD, card, written)
        config = _configuration(layers, base, base_model)
        _write(folder / _CONFIG, json.dumps(config, indent=2) + "\n", written)
        save_coords(model, folder / _WEIGHTS, include_batch_norm=include_batch_norm)
    return folder


def _configuration(layers: Sequence[LayerStatus], base: str, base_model: str) -> dict[str, Any]:
    """What programs ask; the weights' own file tells what is needed to load them."""
    return {
        "library_name": "coordconv-patch",
        "package_version": __version__,
        "base_model": base_model,
        "fingerprint": base,
        "sites": {
            layer.name: {"coords": layer.coords.to_dict(), "shape": list(layer.shape)}
            for layer in layers
        },
    }


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder, and those above it; they go again if what is done in it fails."""
    missing = [each for each in (folder, *folder.parents) if not os.path.exists(each)]
    try:
        with os_errors_reported(f"cannot write {folder}", WeightsError):
            folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for each in missing:
            with suppress(OSError):  # somebody else has written into it meanwhile
                each.rmdir()
        raise


def from_pretrained(
    model: Model,
    source: str | os.PathLike[str],
    *,
    check_base: bool = True,
    **download: Any,
) -> Model:
    """A patched copy of a model, with coordinate weights from a folder or from the Hub.

    Args:
        model: The pretrained model, see :func:`coordconv_patch.load_coords`.
        source: A folder that :func:`save_pretrained` wrote, or the name of a repository.
        check_base: See :func:`coordconv_patch.load_coords`.
        **download: What ``huggingface_hub.hf_hub_download`` takes: ``revision``, ``token``,
            ``cache_dir``, ``local_files_only``, ...

    Returns:
        The copy.

    Raises:
        WeightsError: If there are no such weights, or they do not fit the model; with the reason.
        ArgumentError: If the package huggingface_hub is needed and missing.
    """
    folder = check_path("source", source)
    if os.path.isdir(folder):  # of a path too, names may be too long for the system
        return load_coords(model, folder / _WEIGHTS, check_base=check_base)
    name = str(source)
    if isinstance(source, os.PathLike) or name.startswith((".", "~")) or folder.is_absolute():
        raise WeightsError(f"there is no folder {folder}")
    try:
        path = _huggingface_hub("from_pretrained").hf_hub_download(name, _WEIGHTS, **download)
    except ArgumentError:
        raise
    except Exception as error:
        raise WeightsError(
            f"{excerpt(name)} is neither a folder nor a repository whose {_WEIGHTS} can be had "
            f"({first_line(error)}). Is there a network, and a token for a private one?"
        ) from error
    return load_coords(model, path, check_base=check_base)


def push_to_hub(
    model: nn.Module,
    repository: str,
    *,
    base_model: str = "",
    report: Shown | None = None,
    include_batch_norm: bool = False,
    private: bool | None = None,
    token: str | None = None,
    message: str = "Coordinate weights",
) -> str:
    """Upload the coordinate weights of a patched model to the Hub, which makes the repository.

    A model card that the repository has already is left alone.

    Args:
        model: A patched model.
        repository: ``"OWNER/NAME"``.
        base_model: See :func:`save_pretrained`.
        report: See :func:`save_pretrained`.
        include_batch_norm: See :func:`coordconv_patch.save_coords`.
        private: Whether a new repository is private; ``None``: as the Hub's settings say.
        token: The Hub's access token; ``None``: the one that ``hf auth login`` stored.
        message: That of the commit.

    Returns:
        The address of the commit.

    Raises:
        WeightsError: As :func:`save_pretrained`; or if the Hub refuses the upload, with its reason.
        ArgumentError: If the package huggingface_hub is missing.
    """
    check_text("repository", repository, "OWNER/NAME")
    check_text("message", message, "Coordinate weights")
    if private is not None:
        check_flag("private", private)
    hub = _huggingface_hub("push_to_hub")
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(
            model,
            folder,
            base_model=base_model,
            report=report,
            include_batch_norm=include_batch_norm,
            repository=repository,
        )
        try:
            api = hub.HfApi(token=token)
            api.create_repo(repository, private=private, exist_ok=True)
            has_card = api.file_exists(repository, _CARD)
            commit = api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message=message,
                ignore_patterns=[_CARD] if has_card else None,
            )
        except Exception as error:
            raise WeightsError(
                f"{repository!r} cannot be written ({first_line(error)}). Write OWNER/NAME, and "
                "log in with: hf auth login"
            ) from error
    return str(commit.commit_url)


def _write(path: Path, text: str, written: ExitStack) -> None:
    """Write a file that takes its place when ``written`` is left."""
    temporary = written.enter_context(replacement(path, WeightsError))
    temporary.write_text(text, encoding="utf-8")


def _check_report(report: object) -> None:
    if report is not None and not isinstance(report, Shown):
        raise ArgumentError(
            f"{given('report', report)}: pass what export_onnx, plan or another function of "
            "this package returned"
        )


def _huggingface_hub(function: str) -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ArgumentError(
            f"{function} needs the package huggingface_hub; install it with: pip install "
            '"coordconv-patch[hub]"'
        ) from error
