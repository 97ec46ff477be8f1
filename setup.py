"""What pyproject.toml cannot say: the exercises' tests and mutants travel in the wheel, and the
tested versions of the dependencies.

`check` and `grade` need them where no clone of the repository is. An editable install uses those
of the clone.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

TESTS = Path("tests")
PATTERNS = ("exercises/*.py", "mutants/*.py", "data/golden.json")
PLACE = Path("rlhf_course", "coursework", "bank")
VERSIONS, THEIR_PLACE = "constraints.txt", Path("rlhf_course", "grading", "bundle")


class BuildWithTheBank(build_py):
    """The package, and beside its coursework what `rlhf_course.coursework.bank` looks for."""

    def bank(self) -> dict[str, str]:
        """File in the wheel -> file in the repository."""
        if self.editable_mode:
            return {}
        files = [file for pattern in PATTERNS for file in sorted(TESTS.glob(pattern))]
        place = Path(self.build_lib) / PLACE
        found = {str(place / file.relative_to(TESTS)): str(file) for file in files}
        return found | {str(Path(self.build_lib) / THEIR_PLACE / VERSIONS): VERSIONS}

    def run(self) -> None:
        """Copy the package, then the bank."""
        super().run()
        for target, file in self.bank().items():
            self.mkpath(str(Path(target).parent))
            self.copy_file(file, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """What `run` writes."""
        return [*super().get_outputs(include_bytecode), *self.bank()]

    def get_output_mapping(self) -> dict[str, str]:
        """The same, each with where it comes from."""
        return {**super().get_output_mapping(), **self.bank()}


setup(cmdclass={"build_py": BuildWithTheBank})
