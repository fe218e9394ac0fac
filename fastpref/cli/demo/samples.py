"""The demo's own scored samples: list-making tasks whose answers are scored by the constraints they satisfy.

Made by code and deterministic, so that `fastpref demo` runs without a download. The signal is in the content: how many
of six constraints an answer satisfies, plus noise. Chatter of random length is added independently of it, so "longest
wins" is a coin flip here, which real data does not grant.
"""

import numpy as np

from fastpref.curate import ScoredSamples

_ITEMS = {
    "fruits": ["apple", "banana", "cherry", "grape", "lemon", "mango", "orange", "pear", "plum", "quince"],
    "tools": ["axe", "chisel", "drill", "file", "hammer", "pliers", "saw", "spanner", "vice", "wrench"],
    "rivers": ["Amazon", "Congo", "Danube", "Elbe", "Ganges", "Loire", "Nile", "Rhine", "Tagus", "Volga"],
    "metals": ["brass", "bronze", "copper", "gold", "iron", "lead", "nickel", "silver", "tin", "zinc"],
    "birds": ["crow", "duck", "eagle", "finch", "heron", "lark", "owl", "robin", "stork", "wren"],
    "games": ["bridge", "chess", "darts", "draughts", "go", "ludo", "poker", "rummy", "snap", "whist"],
}
_COUNTS = {"two": 2, "three": 3, "four": 4, "five": 5}
_ORDERS = {"in alphabetical order": False, "in reverse alphabetical order": True}
_CLOSINGS = ["Done.", "That is all.", "End of list.", "Finished."]
_OPENINGS = ["Here you are:", "Certainly:", "Gladly:", "The list:"]
_RUDE_OPENINGS = ["Whatever, take this:", "Not my job, but:", "Ugh, fine:", "If you must:"]
# As long as the chatter they stand in for.
_HEDGES = [
    "I may well be wrong about all of this.",
    "Who knows whether any of it is right.",
    "Please do not quote me on any of these.",
    "Perhaps this is so, and perhaps not.",
]
_CHATTER = [
    "The weather has been mild this week.",
    "There are many ways to look at it.",
    "People often ask for lists of this kind.",
    "A short walk clears the head.",
    "Some of these are better known than others.",
    "The shop around the corner opens at nine.",
]
_NOISE_STD = 0.5  # in constraints


def embedded_samples(prompts=480, responses=16) -> ScoredSamples:
    """Makes `prompts` x `responses` samples, the same ones on every call; scores in constraints, about 0 to 6."""
    generator = np.random.default_rng(20_250_216)
    tasks = [_Task(generator, number) for number in range(1, prompts + 1)]
    pools = [[task.answer(generator) for _ in range(responses)] for task in tasks]
    return ScoredSamples(
        path="embedded samples",
        prompts=[task.prompt for task in tasks],
        responses=[[text for text, _ in pool] for pool in pools],
        scores=[np.array([score for _, score in pool]) for pool in pools],
        problems=[],
        score_field="scores",
    )


class _Task:
    def __init__(self, generator, number):
        self.category = str(generator.choice(list(_ITEMS)))
        count, order = str(generator.choice(list(_COUNTS))), str(generator.choice(list(_ORDERS)))
        self.count, self.reverse = _COUNTS[count], _ORDERS[order]
        self.closing = str(generator.choice(_CLOSINGS))
        # The number makes every prompt unique: the split into training and held-out goes by prompt.
        self.prompt = f'Task {number}: name {count} {self.category} {order} and close with "{self.closing}"'

    def answer(self, generator) -> tuple[str, float]:
        """Makes one answer and its score. A hidden quality sets how likely each constraint is satisfied."""
        satisfied = generator.random(6) < generator.beta(1.2, 1.2)
        friendly, on_topic, right_count, ordered, confident, closed = satisfied
        category = self.category if on_topic else str(generator.choice([c for c in _ITEMS if c != self.category]))
        # One too many as often as one too few, so that the length says nothing about the count.
        count = self.count if right_count else self.count + int(generator.choice([-1, 1]))
        items = sorted(generator.choice(_ITEMS[category], count, replace=False).tolist(), reverse=self.reverse)
        if not ordered:
            items = items[1:] + items[:1]
            ordered = len(items) == 1  # one item is in any order
        sentences = [str(generator.choice(_OPENINGS if friendly else _RUDE_OPENINGS)) + " " + ", ".join(items) + "."]
        sentences += generator.choice(_CHATTER, generator.integers(1, 5), replace=False).tolist()
        if not confident:
            # In the place of a sentence of chatter, not on top of it.
            sentences[-1] = str(generator.choice(_HEDGES))
        closing = self.closing if closed else str(generator.choice([c for c in _CLOSINGS if c != self.closing]))
        score = friendly + on_topic + right_count + bool(ordered) + confident + closed
        return " ".join([*sentences, closing]), float(score + _NOISE_STD * generator.normal())
