"""What a campaign found."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """What was tried without a fault; a fault raises.

    Attributes:
        campaign: What was done.
        cases: How often.
        what: What one case is, in the plural.
        result: What held in every case.
    """

    campaign: str
    cases: int
    what: str
    result: str

    def line(self) -> str:
        """Return it as one line."""
        return f"{self.campaign}: {self.cases:,} {self.what}: {self.result}"


def require(condition: bool, message: str) -> None:
    """Raise AssertionError with a message unless a condition holds, under -O too."""
    if not condition:
        raise AssertionError(message)
