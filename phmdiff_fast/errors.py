"""One exception type: every failure a user can cause ends as one line and an exit code.

The line is ``phmdiff-fast: error[CODE] <subject>/<contrast> <file>: <what>. <cure>``.
"""

from __future__ import annotations

USAGE, DATA, CHECKPOINT, NONFINITE, MEMORY, PEER, BACKEND, IO = 2, 3, 4, 5, 6, 7, 8, 74


class PhmdiffError(Exception):
    """An error with an address and a cure.

    Parameters
    ----------
    code : short upper-case name, e.g. ``NII_TRUNC``
    what : what is wrong; text taken from a file must already have gone through ``repr``
    cure : what the user can do about it
    exit_code : process exit status (2 usage/config, 3 data, 4 checkpoint, 5 non-finite,
        6 out of memory, 7 peer lost, 8 backend, 74 I/O)
    subject, contrast, file : where it is, as far as known
    """

    def __init__(self, code, what, cure="", *, exit_code=DATA, subject=None, contrast=None, file=None):
        self.code, self.what, self.cure, self.exit_code = code, what, cure, exit_code
        self.subject, self.contrast = subject, contrast
        self.file = None if file is None else str(file)
        super().__init__(self.line())

    def line(self) -> str:
        """The one line that is printed, without the program's name."""
        who = "/".join(part for part in (self.subject, self.contrast) if part)
        where = " ".join(part for part in (who, _printable(self.file or "")) if part)
        text = f"error[{self.code}] " + (f"{where}: " if where else "") + self.what.rstrip(".") + "."
        return text + (f" {self.cure.rstrip('.')}." if self.cure else "")

    def located(self, *, subject=None, contrast=None, file=None) -> PhmdiffError:
        """The same error with what the caller knows about its place filled in."""
        return PhmdiffError(
            self.code, self.what, self.cure, exit_code=self.exit_code,
            subject=self.subject or subject, contrast=self.contrast or contrast,
            file=self.file or file,
        )  # fmt: skip


def _printable(text: str) -> str:
    """A file's name as it is, but with escapes for what a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class DataErrors(PhmdiffError):
    """Several data errors of one cohort, told together (``problems``, in order)."""

    SHOWN = 20

    def __init__(self, problems: list[PhmdiffError]):
        self.problems = list(problems)
        first = self.problems[0]
        super().__init__(
            first.code, first.what, first.cure, exit_code=first.exit_code,
            subject=first.subject, contrast=first.contrast, file=first.file,
        )  # fmt: skip

    def lines(self) -> list[str]:
        """At most ``SHOWN`` lines and a count of the rest."""
        shown = [problem.line() for problem in self.problems[: self.SHOWN]]
        left = len(self.problems) - len(shown)
        return shown + ([f"... and {left} more problems"] if left > 0 else [])
