"""The main job in one command, on real weights and real photographs: ``coordconv-patch demo``."""

from coordconv_patch.demo.report import DemoReport
from coordconv_patch.demo.run import run_demo

__all__ = ["DemoReport", "run_demo"]
