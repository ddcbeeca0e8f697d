"""The embedded corpus, plays in an invented language that this module writes.

English function words hold a lexicon of invented nouns, verbs and adjectives together. A model can learn regularities at
every scale: syllables, a Zipfian lexicon, agreement (number, person, `a` or `an`, a preposition for each verb), collocation
(nouns choose adjectives, verbs choose objects), rhyme (couplets), speakers (oaths, favourite nouns, `thou` or `you`),
replies (to the last noun or name) and scenes (a cast, a topic).

All randomness is `Random(SEED).random()`, and no order comes from a hash, so every machine writes the same bytes.
"""

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from textwrap import wrap
from typing import NamedTuple, TypeVar

SEED = 1682
LENGTH = 1_115_000  # characters, about as many as tiny Shakespeare has

T = TypeVar("T")
words = str.split

# Each list is ordered from common to rare, because `Dice.zipf` draws the first most often.
ONSETS = words("t s m b w d f h br l st r g n c gr p th tr fl k sh dr cr bl sp v sk pl gl wh sw fr qu j y sn thr z")
NUCLEI = words("a e i o u ea oo ai ee oa ou")
CODAS = words("n r l t ck nd m s rn st d sh lm ng th p lk mp x ft zz")
LINKS = words("l r n d m nd st b rr v tt g ll mb rt sk bb")
ENDINGS = {
    "noun": words("er en ow le el arn ing ock et ath um"),
    "verb": words("en er le ish ow it ain"),
    "adjective": words("y en some ful ic less ant ous"),
    "name": words("o a ius ine on ia el orn io yx"),
    "place": words("moor ford wick holm mere burgh"),
}
PREPOSITIONS = words("to with for upon from against of by in at")
SINGULAR = words("the a my your this that his her no every our")
PLURAL = words("the my your these those their all our some two")
MODALS = words("will must shall would may can should might")
THOU = {"will": "wilt", "shall": "shalt", "would": "wouldst", "may": "mayst", "can": "canst", "your": "thy"}
ADVERBS = words("now here so again still tonight well too never alone indeed")
LINKERS = words("and but for yet when if so or though nor because while since ere till")
REPLIES = words("Ay No Nay Well Why Peace Indeed Alas Truly Enough")
PRONOUNS = words("I you thou he we she they me thee him them us is am are art not who where thy")
FUNCTION_WORDS = {*PREPOSITIONS, *SINGULAR, *PLURAL, *MODALS, *ADVERBS, *LINKERS, *PRONOUNS}
SUBJECTS = [("I", "am"), ("you", "are"), ("he", "is"), ("we", "are"), ("she", "is"), ("they", "are")]
ROOMS = words("hall street garden field chamber forest shore")
NUMERALS = words("I II III IV V VI VII")


class Verb(NamedTuple):
    stem: str
    preposition: str  # with its space; "" where the verb takes a plain object
    objects: tuple[str, ...]  # the nouns that often follow


@dataclass(frozen=True)
class Voice:
    """A speaker and their habits."""

    name: str
    oath: str
    nouns: tuple[str, ...]  # favourites
    thou: bool  # `thou stavest`, not `you stave`
    rhymes: bool  # speaks in couplets
    asks: float  # how often a sentence is a question


class Dice:
    """Choices drawn from one stream of `random()`."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed).random
        self._cumulative: dict[int, list[float]] = {}

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self.random() * len(items))]

    def zipf(self, items: Sequence[T]) -> T:
        """Return item number r with probability proportional to 1 / (r + 4)."""
        n = len(items)
        if n not in self._cumulative:
            self._cumulative[n] = list(accumulate(1 / (rank + 4) for rank in range(n)))
        cumulative = self._cumulative[n]
        return items[bisect(cumulative, self.random() * cumulative[-1], hi=n - 1)]

    def several(self, items: Sequence[T], count: int) -> tuple[T, ...]:
        return tuple(self.zipf(items) for _ in range(count))


class Lexicon:
    """The invented words, commonest first, and the words that go with them."""

    def __init__(self, dice: Dice) -> None:
        self._dice, self._taken = dice, set(FUNCTION_WORDS)
        self.nouns = self._coin("noun", 1500)
        self.adjectives = self._coin("adjective", 600)
        self.names = [name.upper() for name in self._coin("name", 36)]
        self.places = [capital(place) for place in self._coin("place", 24)]
        self.company = {noun: dice.several(self.adjectives, 4) for noun in self.nouns}
        self.verbs = [
            Verb(stem, f" {dice.pick(PREPOSITIONS)}" if dice.chance(0.4) else "", dice.several(self.nouns, 6))
            for stem in self._coin("verb", 600)
        ]
        self.rhymes: dict[str, list[str]] = {}
        for noun in self.nouns:
            self.rhymes.setdefault(noun[-3:], []).append(noun)

    def _coin(self, kind: str, count: int) -> list[str]:
        coined: list[str] = []
        while len(coined) < count:
            word = self._word(kind, len(coined) / count)
            if len(word) > 3 and word not in self._taken:
                self._taken.add(word)
                coined.append(word)
        return coined

    def _word(self, kind: str, rarity: float) -> str:
        """Rare words are longer; names and places always carry their ending."""
        dice = self._dice
        start = dice.zipf(ONSETS) * dice.chance(0.92) + dice.zipf(NUCLEI)
        if kind not in ("name", "place") and dice.chance(0.8 - rarity):
            return start + dice.zipf(CODAS)
        if dice.chance(0.6 * rarity):
            start += dice.zipf(LINKS) + dice.zipf(NUCLEI)
        return start + dice.zipf(LINKS) + dice.zipf(ENDINGS[kind])


class Playwright:
    """A writer of plays, whose state is the scene's topic, the present speaker and the last noun."""

    def __init__(self, seed: int) -> None:
        self.dice = dice = Dice(seed)
        self.lexicon = lexicon = Lexicon(dice)
        self.voices = []
        for name in lexicon.names:
            oath = f"by my {dice.zipf(lexicon.adjectives)} {dice.zipf(lexicon.nouns)}"
            favourites = dice.several(lexicon.nouns, 8)
            asks = 0.1 + 0.3 * dice.random()
            self.voices.append(Voice(name, oath, favourites, dice.chance(0.4), dice.chance(0.4), asks))
        self.topic = lexicon.nouns
        self.voice = self.voices[0]
        self.spoken_of = lexicon.nouns[0]

    def noun(self) -> str:
        draw = self.dice.random()
        pool = self.topic if draw < 0.35 else self.voice.nouns if draw < 0.5 else self.lexicon.nouns
        self.spoken_of = self.dice.zipf(pool)
        return self.spoken_of

    def you(self, word: str) -> str:
        return THOU.get(word, word) if self.voice.thou else word

    def described(self, noun: str, determiner: str, many: bool = False) -> str:
        """Return a noun with its determiner, such as `an ulmy mool` or `these stary brens`."""
        dice, phrase = self.dice, plural(noun) if many else noun
        if dice.chance(0.35):
            pool = self.lexicon.company[noun] if dice.chance(0.6) else self.lexicon.adjectives
            phrase = f"{dice.zipf(pool)} {phrase}"
        if dice.chance(0.04):
            phrase = f"{dice.zipf(self.lexicon.nouns)}-{phrase}"
        return f"{'an' if determiner == 'a' and phrase[0] in 'aeiou' else determiner} {phrase}"

    def noun_phrase(self, many: bool = False, noun: str = "") -> str:
        dice, determiner = self.dice, self.you(self.dice.zipf(PLURAL if many else SINGULAR))
        if dice.chance(0.06):
            determiner = f"{dice.pick(self.lexicon.places)}'s"
        elif dice.chance(0.06) and determiner != "a":
            determiner += f" {self.noun()}'s"
        phrase = self.described(noun or self.noun(), determiner, many)
        if dice.chance(0.1):
            return f"{phrase} of {dice.pick(self.lexicon.places)}"
        return f"{phrase} that {self.predicate('are' if many else 'is')}" if dice.chance(0.08) else phrase

    def object_of(self, verb: Verb) -> str:
        dice = self.dice
        if dice.chance(0.15):
            return dice.zipf(["me", "thee" if self.voice.thou else "you", "him", "her", "them", "us"])
        return self.noun_phrase(dice.chance(0.3), dice.zipf(verb.objects) if dice.chance(0.4) else "")

    def predicate(self, be: str, final: str = "") -> str:
        """Return a verb phrase whose subject takes the form `be` of to be, and which ends on the noun `final` if given."""
        dice, draw = self.dice, self.dice.random()
        if draw < 0.15:
            noun = final or (self.noun() if dice.chance(0.5) else "")
            return f"{be} {self.described(noun, 'a') if noun else dice.zipf(self.lexicon.adjectives)}"
        verb = dice.zipf(self.lexicon.verbs)
        form = {"is": plural(verb.stem), "art": verb.stem + "est"}.get(be, verb.stem)
        if draw < 0.45:
            modal = dice.zipf(MODALS)
            modal = THOU.get(modal, modal) if be == "art" else modal
            form = f"{modal}{' not' * dice.chance(0.2)} {verb.stem}"
        if final:
            return f"{form}{verb.preposition} {self.described(final, self.you(dice.zipf(SINGULAR)))}"
        if dice.chance(0.2):
            return f"{form} {dice.zipf(ADVERBS)}"
        return f"{form}{verb.preposition} {self.object_of(verb)}"

    def clause(self, final: str = "") -> str:
        """Return a subject and a predicate that agree in number and person."""
        draw = self.dice.random()
        if draw < 0.5:
            many = draw < 0.2
            return f"{self.noun_phrase(many)} {self.predicate('are' if many else 'is', final)}"
        subject, be = self.dice.zipf(SUBJECTS)
        if subject == "you" and self.voice.thou:
            subject, be = "thou", "art"
        return f"{subject} {self.predicate(be, final)}"

    def sentence(self, to: str) -> str:
        dice, draw = self.dice, self.dice.random()
        if draw < self.voice.asks:
            return capital(self.question())
        if draw < 0.6:
            verb = dice.zipf(self.lexicon.verbs)
            return capital(f"{verb.stem}{verb.preposition} {self.object_of(verb)}{f', {to}' * dice.chance(0.5)}!")
        text = f"{self.voice.oath}, {self.clause()}" if dice.chance(0.15) else self.clause()
        if dice.chance(0.5):
            text += f"{dice.pick(',,;')} {dice.zipf(LINKERS)} {self.clause()}"
        return capital(text) + dice.pick("..!")

    def question(self) -> str:
        draw = self.dice.random()
        if draw < 0.4:
            return f"who {self.predicate('is')}?"
        if draw < 0.7:
            return f"where is {self.noun_phrase()}?"
        asked = "wilt thou" if self.voice.thou else "will you"
        return f"{asked} {self.dice.zipf(self.lexicon.verbs).stem} {self.dice.zipf(ADVERBS)}?"

    def couplet(self) -> list[str]:
        first = self.noun()
        second = self.dice.zipf(self.lexicon.rhymes[first[-3:]])
        link = capital(self.dice.zipf(LINKERS))
        return [capital(self.clause(first)) + ",", f"{link} {self.clause(second)}{self.dice.pick('..!')}"]

    def speech(self, to: str) -> list[str]:
        """Return the lines of one turn, which often opens with the last noun or the other's name."""
        dice, draw = self.dice, self.dice.random()
        opening = [f"{capital(self.described(self.spoken_of, 'the'))}?"] if draw < 0.2 else []
        if 0.2 <= draw < 0.5:
            opening = [f"{dice.zipf(REPLIES)}, {to}!"]
        if self.voice.rhymes:
            return opening + [line for _ in range(1 + int(3 * dice.random())) for line in self.couplet()]
        sentences = [self.sentence(to) for _ in range(1 + int(4 * dice.random()))]
        return wrap(" ".join(opening + sentences), 60, break_long_words=False, break_on_hyphens=False)

    def scene(self, heading: str, company: Sequence[Voice]) -> str:
        dice = self.dice
        self.topic = list(dice.several(self.lexicon.nouns, 24))
        cast = [company[0], *dict.fromkeys(dice.several(company[1:], 5))]
        names = ", ".join(voice.name for voice in cast[1:])
        blocks = [f"{heading}. A {dice.pick(ROOMS)} in {dice.pick(self.lexicon.places)}."]
        blocks.append(f"[Enter {names} and {cast[0].name}.]")
        listener, self.voice = cast[:2]
        refrain = capital(self.clause()) + "!"
        for _ in range(12 + int(20 * dice.random())):
            others = [voice for voice in cast if voice is not self.voice]
            speaker = listener if dice.chance(0.6) else dice.pick(others)
            listener, self.voice = self.voice, speaker
            lines = [refrain] if dice.chance(0.08) else self.speech(capital(listener.name.lower()))
            blocks.append("\n".join([f"{speaker.name}:", *lines]))
        return "\n\n".join([*blocks, "[Exeunt.]"])

    def play(self) -> str:
        """Return a play of five acts of a few scenes each, for one company of players."""
        company = list(dict.fromkeys(self.dice.pick(self.voices) for _ in range(10)))
        scenes = [f"THE {self.dice.pick(('TRAGEDY', 'COMEDY', 'HISTORY'))} OF {company[0].name}"]
        for act in NUMERALS[:5]:
            for number in NUMERALS[: 3 + int(5 * self.dice.random())]:
                scenes.append(self.scene(f"ACT {act}, SCENE {number}", company))
        return "\n\n".join(scenes)


def plural(word: str) -> str:
    return word + ("es" if word.endswith(("s", "sh", "x", "z")) else "s")


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def generate() -> str:
    """Return the whole corpus, plays one after another up to the end of the line that holds character number LENGTH."""
    playwright, text = Playwright(SEED), ""
    while len(text) < LENGTH:
        text += playwright.play() + "\n\n"
    return text[: text.index("\n", LENGTH - 1) + 1]
