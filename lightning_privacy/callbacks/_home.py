"""What callbacks know when their fit ran in processes that have ended since."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_privacy.errors import GuaranteeError

if TYPE_CHECKING:
    from lightning_privacy.callbacks._state import RunState
    from lightning_privacy.callbacks._tally import Tally


class Home:
    """Keeps a callback from telling what it cannot know, and takes in what comes back.

    Args:
        state: What was spent.
        tally: What the draws looked like.
    """

    def __init__(self, state: RunState, tally: Tally) -> None:
        self._state, self._tally = state, tally
        self._away = False

    def leave(self) -> None:
        """Note that the fit goes on in other processes."""
        self._away = True

    def arrive(self) -> None:
        """Note, in such a process, that this is where the fit runs."""
        self._away = False

    def require(self) -> None:
        """Refuse to answer while nothing has come back.

        Raises:
            GuaranteeError: The processes were started, and did not come to their end.
        """
        if self._away:
            raise GuaranteeError(
                must="a callback answers for all that its fit has spent",
                found="a fit in other processes, which ended without a word",
                cost="an ε of 0 for steps that were made",
                remedy="resume from a checkpoint, which charges them, or read its journal",
            )

    def luggage(self) -> dict[str, Any]:
        """Pack what the process that called ``fit`` has to know.

        Returns:
            Plain values; no secret.
        """
        return {
            "state": self._state.state_dict(),
            "tally": self._tally.state_dict(),
            "planned_epsilon": self._state.planned_epsilon,
        }

    def come_home(self, luggage: dict[str, Any]) -> None:
        """Unpack it.

        Args:
            luggage: What `luggage` returned there.
        """
        self._away = False
        if luggage["state"]:
            self._state.restore(luggage["state"], [], journal=False)
        self._state.planned_epsilon = luggage["planned_epsilon"]
        self._tally.load_state_dict(luggage["tally"])


class Parcel:
    """Values that Lightning passes on as they are: it takes collections apart to move tensors.

    Args:
        contents: What is passed on.
    """

    def __init__(self, contents: dict[str, Any]) -> None:
        self.contents = contents


class Results:
    """Brings home what a callback has found, as rank 0 found it.

    Args:
        owner: The callback.
        names: Its attributes; they are None, or empty, until a fit has found something.
    """

    def __init__(self, owner: Any, *names: str) -> None:
        self._owner, self._names = owner, names

    def leave(self) -> None:
        """Nothing to do: what was found before is shown until something else comes home."""

    def luggage(self) -> Parcel:
        """Pack what was found.

        Returns:
            The attributes; no secret.
        """
        return Parcel({name: getattr(self._owner, name) for name in self._names})

    def come_home(self, luggage: Parcel) -> None:
        """Unpack it.

        Args:
            luggage: What `luggage` returned there.
        """
        for name, value in luggage.contents.items():
            setattr(self._owner, name, value)
