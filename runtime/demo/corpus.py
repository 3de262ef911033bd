"""The text behind the demo checkpoint, and the two shapes it is learned in.

The text is the King James Version of the Bible, in the public domain: its copyright has long
expired, as the `copyright` file of Debian's package `bible-kjv-text` states. That package holds
the text, compressed; the program `bible` of Debian's package `bible-kjv` prints it, one verse a
line. Nothing of either package is copied into the checkpoint but the words.

Owns where the text comes from and how it becomes documents: running prose by chapter, and short
conversations whose answers are passages of the same text. Knows nothing of tokens or models.
"""

import random
import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

END = "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
# One role token, the words, the end token: for each message.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] | trim }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# How `bible` abbreviates the books, in order, where it does.
_BOOKS = {
    "Ge": "Genesis", "Exo": "Exodus", "Lev": "Leviticus", "Num": "Numbers", "Deu": "Deuteronomy",
    "Josh": "Joshua", "Jdgs": "Judges", "1Sm": "1 Samuel", "2Sm": "2 Samuel", "1Ki": "1 Kings",
    "2Ki": "2 Kings", "1Chr": "1 Chronicles", "2Chr": "2 Chronicles", "Neh": "Nehemiah",
    "Est": "Esther", "Psa": "Psalm", "Prv": "Proverbs", "Eccl": "Ecclesiastes",
    "SSol": "Song of Solomon", "Isa": "Isaiah", "Jer": "Jeremiah", "Lam": "Lamentations",
    "Eze": "Ezekiel", "Dan": "Daniel", "Hos": "Hosea", "Obad": "Obadiah", "Mic": "Micah",
    "Hab": "Habakkuk", "Zep": "Zephaniah", "Hag": "Haggai", "Zec": "Zechariah", "Mal": "Malachi",
    "Mat": "Matthew", "Rom": "Romans", "1Cor": "1 Corinthians", "2Cor": "2 Corinthians",
    "Gal": "Galatians", "Eph": "Ephesians", "Phi": "Philippians", "Col": "Colossians",
    "1Th": "1 Thessalonians", "2Th": "2 Thessalonians", "1Tim": "1 Timothy", "2Tim": "2 Timothy",
    "Phmn": "Philemon", "Heb": "Hebrews", "Jas": "James", "1Pet": "1 Peter", "2Pet": "2 Peter",
    "1Jn": "1 John", "2Jn": "2 John", "3Jn": "3 John", "Rev": "Revelation",
}  # fmt: skip

# Verses that open with one of these often open a new thought: good places for a paragraph.
_OPENERS = re.compile(
    r"And it came to pass|Now |Then |But |Moreover|Thus saith|Therefore|And the LORD s|O |Hear "
    r"|Again|In the |After|These |And when |Behold|Blessed|Woe|And Jesus|For "
)
_ASK = (
    "Speak of {}.", "Tell me of {}.", "Tell me about {}.", "What is written of {}?",
    "What do you know of {}?", "Write a passage about {}.", "Let me hear of {}.",
)  # fmt: skip
_ASK_PERSON = ("Who was {}?", "Who is {}?", "What did {} do?")
_THINGS = frozenset(
    """
    altar angel ark army battle beasts blessing blood bread brethren bride captivity cattle
    chariots children city cloud commandments corn covenant cup darkness daughter day death
    desert dream dust earth enemies eyes faith famine fasting father fear field fire fish flock
    fool garden garments gate gift glory gold grace grapes grass hand harvest heart heaven honey
    hope horses house hunger husband idols inheritance iron journey joy judge judgment justice
    king kingdom lamb lamp land law life light lion love man master mercy milk mother mountain
    mountains mouth music nations night offering oil palace parable peace people pillar plague
    poor prayer pride priest priests prison promise prophet prophets rain repentance rich
    righteousness river robe rock sabbath sacrifice saints salvation sand scribes sea seed
    serpent servant sheep shepherd ships sickness silver sin sinners sleep snow soldiers son
    song sorrow soul spirit spoil stars stone stones storm stranger strength sun sword
    tabernacle tears temple tent thief thieves throne tongue tree trees tribes trumpet truth
    vessels vine vineyard virgin vision voice vow wall war watchmen water waters wicked widow
    wife wilderness wind wine wings wisdom witness wolf women works wrath youth
    """.split()
)
# Capitals that are no names, and that never stand in lower case by which to tell.
_NOT_NAMES = frozenset("Aha Alas Amen Answerest Hosanna Selah Verily Whosesoever".split())
_SYSTEM = (
    "Answer with a passage of scripture.",
    "You are a scribe. Answer with a passage.",
    "You are a helpful assistant.",
)


@dataclass(frozen=True, slots=True)
class Chapter:
    """One chapter: `heading` names it, `verses` are its words, without numbers."""

    book: str
    number: int
    verses: tuple[str, ...]

    @property
    def heading(self) -> str:
        chapter = "" if self.book == "Psalm" else ", chapter"
        return f"{self.book}{chapter} {self.number}"


def download_text(timeout_s: float = 120.0) -> str:
    """The whole text as `bible -f` prints it, from a Debian mirror; needs apt-get and dpkg."""
    with tempfile.TemporaryDirectory() as folder:

        def run(*command: str, cwd: str = folder) -> str:
            done = subprocess.run(
                command, cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=False
            )
            if done.returncode != 0:
                raise RuntimeError(
                    f"`{' '.join(command)}` ended with {done.returncode}: {done.stderr.strip()}"
                )
            return done.stdout

        run("apt-get", "download", "bible-kjv-text", "bible-kjv")
        for package in sorted(Path(folder).glob("*.deb")):
            run("dpkg", "-x", str(package), ".")
        # The program looks for its data in the current folder first.
        return run("../bin/bible", "-f", "gen1:1-rev22:21", cwd=f"{folder}/usr/lib")


def parse(text: str) -> list[Chapter]:
    """Lines such as `Ge1:1 In the beginning ...` to chapters, in order."""
    verses: dict[tuple[str, int], list[str]] = defaultdict(list)
    for number, line in enumerate(text.splitlines(), start=1):
        match = re.fullmatch(r"(\d?[A-Za-z]+)(\d+):\d+ (.+)", line.strip())
        if match is None:
            raise ValueError(f"line {number} is no verse (`Ge1:1 In the ...`): {line[:60]!r}")
        verses[match[1], int(match[2])].append(" ".join(match[3].split()))
    return [
        Chapter(_BOOKS.get(book, book), number, tuple(lines))
        for (book, number), lines in verses.items()
    ]


def prose(chapter: Chapter) -> list[str]:
    """The chapter as documents: the heading, then passages of one or two paragraphs.

    Only the first passage carries the heading, so the model also learns to begin in the middle.
    """
    paragraphs: list[list[str]] = [[]]
    for verse in chapter.verses:
        length = len(paragraphs[-1])
        if length >= 5 or (length >= 2 and _OPENERS.match(verse)):
            paragraphs.append([])
        paragraphs[-1].append(verse)
    texts = [" ".join(paragraph) for paragraph in paragraphs]
    passages = ["\n\n".join(texts[start : start + 2]) for start in range(0, len(texts), 2)]
    passages[0] = f"{chapter.heading}\n\n{passages[0]}"
    return [passage + END for passage in passages]


def _names(text: str) -> frozenset[str]:
    """The words of `text` with a capital that (almost) never stand in lower case."""
    counts = Counter(re.findall(r"[A-Za-z]+", text))
    return frozenset(
        word
        for word, count in counts.items()
        if re.fullmatch(r"[A-Z][a-z]{2,}", word)
        and count >= 3
        and counts[word.lower()] < 0.1 * count
        and word not in _NOT_NAMES
    )


def _topics(chapters: list[Chapter]) -> dict[str, list[tuple[Chapter, int]]]:
    """Names and things -> the verses that mention them early on, as (chapter, verse index)."""
    found: dict[str, list[tuple[Chapter, int]]] = defaultdict(list)
    names = _names(" ".join(verse for chapter in chapters for verse in chapter.verses))
    for chapter in chapters:
        for index, verse in enumerate(chapter.verses):
            words = re.findall(r"[A-Za-z]+", verse)
            if sum(word in names for word in words) > 6:
                continue  # a genealogy, a list of cities
            for word in dict.fromkeys(words[:14]):
                if word in names:
                    found[word].append((chapter, index))
                elif word in _THINGS:
                    found[f"the {word}"].append((chapter, index))
                elif word == "LORD":
                    found["the LORD"].append((chapter, index))
    return {topic: places for topic, places in sorted(found.items()) if len(places) >= 3}


def conversations(chapters: list[Chapter], count: int, rng: random.Random) -> list[str]:
    """`count` conversations in the format of CHAT_TEMPLATE, drawn with `rng`.

    A question names a person, a place or a thing; the answer is a passage of two or three verses,
    more where the sentence is longer, the first of which mentions it. Some ask for the opening of
    a chapter, some ask to go on.
    """
    topics = _topics(chapters)
    things = {f"the {thing}" for thing in _THINGS}
    # Known names come often, rare ones still come.
    weights = [len(places) ** 0.6 for places in topics.values()]
    documents = []
    for topic in rng.choices(list(topics), weights, k=count):
        if rng.random() < 0.1:
            chapter, start = rng.choice(chapters), 0
            question = rng.choice(("Read {}.", "Read me {}.", "How does {} begin?"))
            question = question.format(chapter.heading)
        else:
            chapter, start = rng.choice(topics[topic])
            person = topic[0].isupper() and rng.random() < 0.3
            named = topic.removeprefix("the ") if rng.random() < 0.5 and topic in things else topic
            question = rng.choice(_ASK_PERSON if person else _ASK).format(named)
        parts = []
        if rng.random() < 0.15:
            parts.append(f"<|system|>{rng.choice(_SYSTEM)}{END}")
        while True:
            stop = start + rng.randint(2, 3)
            while (
                stop < start + 6
                and chapter.verses[stop - 1 : stop]
                and (chapter.verses[stop - 1][-1] not in ".?!")
            ):
                stop += 1  # end with a sentence
            passage = " ".join(chapter.verses[start:stop])
            parts.append(f"<|user|>{question}{END}<|assistant|>{passage}{END}")
            start = stop
            if start >= len(chapter.verses) or rng.random() < 0.85:
                break
            question = rng.choice(("Go on.", "Continue.", "And then?", "What came after?"))
        documents.append("".join(parts))
    return documents
