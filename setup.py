"""What pyproject.toml cannot say: a wheel holds the examples, which `trl-qtarget recipes` copies."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithExamples(build_py):
    def run(self):
        super().run()
        examples = Path(__file__).parent / "examples"
        if not self.editable_mode and examples.is_dir():
            target = Path(self.build_lib) / "trl_qtarget" / "_examples"
            shutil.copytree(examples, target, ignore=shutil.ignore_patterns("__pycache__", "outputs"))


setup(cmdclass={"build_py": WithExamples})
