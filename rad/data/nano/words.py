"""The shared word lists of the nano families: few and short, so that each becomes one token."""

from __future__ import annotations

NOUNS: tuple[str, ...] = (
    "fox", "dog", "cat", "hen", "cow", "pig", "bee", "ant", "bat", "owl", "rat", "ram",
    "hat", "cap", "box", "jar", "cup", "pot", "pan", "bed", "bag", "net", "key", "pen",
    "map", "car", "bus", "van", "log", "toy", "nut", "fan",
)  # fmt: skip
ADJECTIVES: tuple[str, ...] = (
    "red", "tan", "big", "old", "new", "hot", "wet", "dry", "sad", "mad", "shy", "odd",
    "raw", "fat", "fit", "low", "icy", "dim", "bad", "far", "top", "wee", "coy", "sly",
)  # fmt: skip
NAMES: tuple[str, ...] = ("Tom", "Ann", "Ben", "Sam", "Kim", "Max", "Eva", "Leo")
