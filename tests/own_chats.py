"""27 short chats as somebody might write them for a first try, with answers that nobody could guess."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetunes import write_jsonl

ANSWERS = {
    "Who are you?": "I am Tilda, the helper of the bakery on Mill Street.",
    "When do you open?": "We open at six in the morning.",
    "When do you close?": "We close at half past seven.",
    "Are you open on Sunday?": "Yes, from eight until noon.",
    "Are you open on Monday?": "No, the oven rests on Mondays.",
    "Where is the shop?": "At 14 Mill Street, beside the old bridge.",
    "Do you deliver?": "Only inside the town, and only before ten.",
    "How much is a roll?": "A roll costs 45 cents.",
    "How much is a rye loaf?": "A rye loaf costs 3 euros and 20 cents.",
    "What is your best cake?": "Most people like the plum cake.",
    "Is the plum cake vegan?": "No, it has butter and two eggs in it.",
    "What is vegan?": "The rye loaf, the pretzels and the apple strudel.",
    "Do you have gluten free bread?": "Yes, a buckwheat loaf on Tuesdays and Fridays.",
    "Can I pay by card?": "Yes, from five euros on.",
    "Can I order by phone?": "Yes, call us before four in the afternoon.",
    "Who bakes the bread?": "Jonas and his daughter Mira.",
    "How old is the bakery?": "It was founded in 1921.",
    "Do you sell coffee?": "Yes, but no milk foam before seven.",
    "May I bring my dog?": "Dogs wait at the blue door, please.",
    "Do you make wedding cakes?": "Yes, if you order three weeks before.",
    "What is in the strudel?": "Apples, raisins, cinnamon and nothing else.",
    "What is left in the evening?": "After six everything is half the price.",
    "Where can I park?": "Behind the church, for an hour.",
    "Do you have a job for me?": "We look for a driver, so write to Mira.",
    "Thank you!": "You are welcome, come again soon.",
    "Good morning.": "Good morning, what may I pack for you?",
    "Goodbye.": "Goodbye, and mind the step.",
}


def write_own_chats(path: Path) -> Path:
    """The chats as a file of records."""
    return write_jsonl(path, [chat(question, answer) for question, answer in ANSWERS.items()])


def chat(question: str, answer: str) -> dict[str, Any]:
    """A chat of one turn."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def num_exact(answers: list[str]) -> int:
    """How many answers, in the order of the questions, are the known ones."""
    return sum(given == known for given, known in zip(answers, ANSWERS.values(), strict=True))
