"""The words of a plan: which numbers are legal, what wrong ones cost, how it is described."""

from __future__ import annotations

from lightning_privacy.types import NeighbouringRelation

RANGES = {
    "sample_rate": (
        "(0, 1]",
        "another sampling than the accounted one",
        "pass the probability with which each unit is drawn",
    ),
    "expected_batch_size": (
        "(0, inf)",
        "a gradient divided by something other than the public constant",
        "pass the expected number of units in a draw",
    ),
    "noise_multiplier": (
        "[0, inf)",
        "noise of another size than the accounted one",
        "pass σ, the standard deviation of the noise over the clip norm",
    ),
    "clip_norm": (
        "(0, inf)",
        "contributions without a bound, or without any effect",
        "pass the largest norm that one unit may contribute, for instance 1.0",
    ),
    "precision_slack": (
        "[0, 1)",
        "rounding errors that exceed the clip norm and are not accounted for",
        "use precision_slack_for(precision)",
    ),
}
COUNTS = {
    "steps": (
        "an ε for another number of steps than will run",
        "pass the number of private steps that the run will make",
    ),
    "releases_per_draw": (
        "published gradients that are not accounted for",
        "pass how many noised gradients one draw leads to, usually 1",
    ),
}
RELATION_WORDS = {
    NeighbouringRelation.ADD_OR_REMOVE: "one unit added or removed",
    NeighbouringRelation.ZERO_OUT: "one unit zeroed out (the number of units is public)",
}


DRAWN_WORDS = {
    "users": "users; the mean over at most {} examples of each",
    "examples": "examples, out of at most {} of each user",
}
PRIVATE_TIERS = "by each user's own record, and private: only the epsilon above holds for all"
