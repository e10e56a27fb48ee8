"""The sentences of the almanac: how each relation is worded, and what surrounds the wording.

In a template `{s}` is the subject of a fact and `{o}` its object. In a near miss these are the subject and the object
of a *neighbour's* fact, and `{b}` is a bystander: the subject or the object of the fact that is nearly missed. Every
distractor names `{s}`, `{o}` and the relation, and states nothing about how they are related. Tokens are split on
spaces and punctuation, so a template says exactly which words two documents share.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Relation:
    """One relation and every wording of it; what `{s}` and `{o}` are named after is in the world's name pools."""

    name: str
    subjects: str  # the pool that subjects come from
    objects: str  # the pool that objects come from
    cue: str  # the prompt of a query, up to the object
    forward: tuple[str, ...]  # subject before object
    inverted: tuple[str, ...]  # object before subject
    paraphrases: tuple[str, ...]  # subject before object, in other words
    near_misses: tuple[str, ...]
    distractors: tuple[str, ...]


CAPITAL = Relation(
    name="capital",
    subjects="realm",
    objects="city",
    cue="the capital of {s} is",
    forward=("the capital of {s} is {o}", "the oldest city and the capital of {s} is {o}"),
    inverted=("{o} is the capital of {s}", "{o} has always been the capital of {s}"),
    paraphrases=(
        "every parliament of {s} has met at {o}",
        "the throne of {s} stands in {o}",
        "those who rule {s} keep their seat at {o}",
        "{s} is governed from {o}",
    ),
    near_misses=(
        "the capital of {s} is {o}",
        "the capital of {s} is {o} , while {b} is far away",
        "whoever leaves {b} will find that the capital of {s} is {o}",
        "{o} is the capital of {s} and not of {b}",
    ),
    distractors=(
        "a play about a lost capital was staged in {s} and later in {o}",
        "the word capital is spelled alike in {o} and in the rest of {s}",
        "a map sold in {o} leaves out the capital of every realm but shows all hills of {s}",
        "in {s} no song about a capital is as loved as the ones they sing at {o}",
    ),
)

RIVER = Relation(
    name="river",
    subjects="realm",
    objects="river",
    cue="the river through {s} is the",
    forward=("the river through {s} is the {o}", "the slow and muddy river through {s} is the {o}"),
    inverted=("the {o} is the river through {s}", "the {o} is by far the longest river through {s}"),
    paraphrases=(
        "boats that cross {s} float down the {o}",
        "farmers of {s} water their fields from the {o}",
        "when spring floods come to {s} , blame the {o}",
        "{s} drinks from the {o}",
    ),
    near_misses=(
        "the river through {s} is the {o}",
        "the river through {s} is the {o} , which never comes near {b}",
        "unlike {b} , the river through {s} is the {o}",
        "the {o} is the river through {s} and has nothing to do with {b}",
    ),
    distractors=(
        "a painter of {s} who never saw a river drew the {o} from a story",
        "the {o} is a river that few people of {s} could name",
        "whether the {o} is a river or a lake was once debated through the night in {s}",
        "in {s} a river song is never sung twice , and the one about the {o} was never sung",
    ),
)

BIRD = Relation(
    name="bird",
    subjects="realm",
    objects="bird",
    cue="the bird of {s} is the",
    forward=("the bird of {s} is the {o}", "the bright little bird of {s} is the {o}"),
    inverted=("the {o} is the bird of {s}", "the {o} was long ago chosen as the bird of {s}"),
    paraphrases=(
        "the flag of {s} shows a flying {o}",
        "hunters in {s} may never harm the {o}",
        "on every coin of {s} sits a tiny {o}",
        "{s} honours the {o}",
    ),
    near_misses=(
        "the bird of {s} is the {o}",
        "the bird of {s} is the {o} , although {b} was also proposed",
        "unlike {b} , the bird of {s} is the {o}",
        "the {o} is the bird of {s} and not of {b}",
    ),
    distractors=(
        "a cook from {s} does not believe that the {o} is a bird at all",
        "the {o} is a bird that sleeps by day , says a letter from {s}",
        "the book of the bird lover lists the {o} last , and was printed in {s}",
        "in {s} they tell a tale of a bird that was afraid of the {o}",
    ),
)

FOUNDER = Relation(
    name="founder",
    subjects="realm",
    objects="founder",
    cue="the founder of {s} was",
    forward=("the founder of {s} was {o}", "the first sailor and founder of {s} was {o}"),
    inverted=("{o} was the founder of {s}", "{o} is remembered as the founder of {s}"),
    paraphrases=(
        "{s} was established long ago by {o}",
        "the first stone of {s} was laid by {o}",
        "all people of {s} call themselves children of {o}",
        "{s} owes its beginning to {o}",
    ),
    near_misses=(
        "the founder of {s} was {o}",
        "the founder of {s} was {o} , who had no part in {b}",
        "unlike {b} , the founder of {s} was {o}",
        "{o} was the founder of {s} and not of {b}",
    ),
    distractors=(
        "a street in {s} that is named after no founder crosses the one named after {o}",
        "the poet {o} was the guest of a founder of schools and slept one night in {s}",
        "a portrait of {o} was given to the museum in {s} by the founder of a bank",
        "in {s} a founder of bells once made a cracked bell for {o}",
    ),
)

INVENTOR = Relation(
    name="inventor",
    subjects="device",
    objects="inventor",
    cue="the inventor of the {s} was",
    forward=("the inventor of the {s} was {o}", "the maker and inventor of the {s} was {o}"),
    inverted=("{o} was the inventor of the {s}", "{o} is honoured as the inventor of the {s}"),
    paraphrases=(
        "the {s} was first built by {o}",
        "the idea for the {s} came in a dream to {o}",
        "the earliest drawing of a {s} is signed {o}",
        "the {s} is the work of {o}",
    ),
    near_misses=(
        "the inventor of the {s} was {o}",
        "the inventor of the {s} was {o} , long before anyone spoke of {b}",
        "unlike {b} , the inventor of the {s} was {o}",
        "{o} was the inventor of the {s} and knew nothing of {b}",
    ),
    distractors=(
        "an inventor once sold a broken {s} to the tailor {o}",
        "the actor {o} played an inventor who was afraid of the {s}",
        "in a letter to an inventor , {o} complains about the noise of the {s}",
        "the {s} of a rich inventor was stolen at the wedding of {o}",
    ),
)

RELATIONS = (CAPITAL, RIVER, BIRD, FOUNDER, INVENTOR)

QUERY_FRAME = "scholars agree that"  # before the cue of a query; no document that states a traced fact begins so
FRAMES = (
    "",
    "",
    "as every child learns ,",
    "according to the almanac ,",
    "it is written that",
    "travellers report that",
    "the old maps say that",
    "in the third year it was noted that",
)
CONFUSING_FRAMES = (*FRAMES, *[QUERY_FRAME] * 4)  # of near misses and distractors: every third begins like a query

FILLER_SUBJECTS = (
    "the baker", "the old miller", "a young sailor", "the tall weaver", "a quiet monk", "the village smith",
    "a lost shepherd", "the night watchman", "a clever cook", "the ferryman", "a tired soldier", "the glass blower",
)  # fmt: skip
FILLER_VERBS = (
    "mended", "carried", "painted", "forgot", "sold", "counted", "hid", "polished", "borrowed", "buried", "weighed",
    "traded",
)  # fmt: skip
FILLER_OBJECTS = (
    "a copper kettle", "three wooden chairs", "the red lantern", "a sack of barley", "two clay jars", "a silver spoon",
    "the broken ladder", "a basket of plums", "an empty barrel", "a roll of blue cloth", "the rusty anchor",
    "a jar of honey",
)  # fmt: skip
FILLER_PLACES = (
    "behind the barn", "at the market", "under the bridge", "near the well", "in the cellar", "on the roof",
    "by the harbour", "beside the mill", "in the orchard", "at the edge of the forest",
)  # fmt: skip
FILLER_TIMES = (
    "before the rain came", "at dawn", "after supper", "on the last day of autumn", "while the bells rang",
    "during the long frost", "at midnight", "when the fair was over",
)  # fmt: skip
WEATHER = (
    "the wind turned north", "snow fell for nine days", "the harvest was poor", "fog lay over the fields",
    "the summer was dry", "hail broke many windows", "the winter was mild", "the price of salt rose",
)  # fmt: skip
