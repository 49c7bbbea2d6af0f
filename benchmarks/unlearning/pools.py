"""The words that the made-up facts consist of: data only."""

from __future__ import annotations

__all__ = ["CAPITALS", "FORMS", "KNOWN", "ONSETS", "POOLS", "RIMES"]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _paired(first: str, second: str) -> tuple[str, ...]:
    heads, tails = first.split(), second.split()
    return tuple(f"{head} {tail}" for head in heads for tail in tails)


#: Syllables of personal names.
ONSETS = _words("b br d dr f g gr h j k kl l m n p r s st t tr v w z")
RIMES = _words("a e i o u al an ar el en ia ik il in ir on or ul un us")

_JOBS = (
    "baker barber beekeeper blacksmith bookbinder brewer butcher carpenter clockmaker cobbler "
    "cooper dentist diver doctor driver farmer ferryman fisher gardener glazier grocer hunter "
    "jeweller judge lawyer mason miller miner nurse painter pharmacist pilot plumber porter "
    "potter priest roofer sailor shepherd smith soldier tailor tanner teacher typist weaver"
)

#: Values of each attribute.
POOLS: dict[str, tuple[str, ...]] = {
    "city": _words(
        "Antwerp Arles Basel Bergen Bilbao Bremen Brno Cadiz Cardiff Cork Cracow Delft Dresden "
        "Esbjerg Faro Genoa Ghent Graz Haarlem Izmir Kaunas Leeds Leipzig Liege Lille Linz Lyon "
        "Malmo Messina Namur Nantes Odense Oulu Pilsen Porto Rostock Seville Split Tartu Turin "
        "Turku Utrecht Varna Verona"),
    "genre": _words(
        "fantasy satire memoir horror romance travel history crime comedy tragedy poetry fables "
        "thriller western biography essays drama mystery sagas ballads war epics legends letters "
        "sermons riddles limericks sonnets"),
    "father": _words(_JOBS),
    "mother": _words(_JOBS),
    "award": _paired("Amber Golden Silver Bronze Crystal Scarlet Ivory Jade",
                     "Quill Lantern Laurel Medal Feather Crown"),
    "year": tuple(str(year) for year in range(1900, 1980)),
    "book": _paired("Broken Distant Frozen Hidden Hollow Last Quiet Red Silent Winter",
                    "Bridge Garden Harbour Mirror Mountain Orchard River Tower"),
    "pet": _words(
        "badger beagle budgie canary cat crow donkey dove duck ferret frog gecko goat goose "
        "hamster hedgehog hen horse iguana lamb lizard llama magpie mouse newt otter owl parrot "
        "pigeon pony poodle pug rabbit rat raven skink snake terrier toad tortoise turtle"),
    "instrument": _words(
        "accordion bagpipes banjo bassoon bugle cello clarinet concertina cornet cymbals drum "
        "dulcimer fiddle flute gong guitar harmonica harp horn kazoo lute lyre mandolin marimba "
        "oboe organ piano piccolo recorder saxophone sitar spinet timpani triangle trombone "
        "trumpet tuba ukulele viola violin xylophone zither"),
    "school": _paired("Ashby Barton Calder Dunmore Elmwood Fairfax Grafton Hadley",
                      "Academy College Institute Lyceum Seminary"),
}  # fmt: skip

#: Two ways to ask for each attribute.
FORMS: dict[str, tuple[str, str]] = {
    "city": ("In which city was {} born?", "What is the birthplace of {}?"),
    "genre": ("Which genre does {} write?", "What kind of literature is {} known for?"),
    "father": ("What was the job of {}'s father?", "How did the father of {} earn a living?"),
    "mother": ("What was the job of {}'s mother?", "How did the mother of {} earn a living?"),
    "award": ("Which award did {} win?", "What prize was given to {}?"),
    "year": ("In which year was {} born?", "When did the life of {} begin?"),
    "book": ("What is the best known book of {}?", "Which title made {} famous?"),
    "pet": ("Which pet does {} keep?", "What animal lives with {}?"),
    "instrument": ("Which instrument does {} play?", "On what does {} make music?"),
    "school": ("Which school did {} attend?", "Where was {} educated?"),
    "capital": ("What is the capital of {}?", "Which city governs {}?"),
}

#: Names of the authors that every model knows; they have made-up facts like the others.
KNOWN = (
    "Jane Austen", "Anton Chekhov", "Charles Dickens", "Victor Hugo", "Henrik Ibsen",
    "Franz Kafka", "Selma Lagerlof", "Leo Tolstoy", "Mark Twain", "Virginia Woolf",
)  # fmt: skip

#: Real facts.
CAPITALS = {
    "Austria": "Vienna", "Belgium": "Brussels", "Bulgaria": "Sofia", "Canada": "Ottawa",
    "Chile": "Santiago", "China": "Beijing", "Cuba": "Havana", "Denmark": "Copenhagen",
    "Egypt": "Cairo", "Estonia": "Tallinn", "Finland": "Helsinki", "France": "Paris",
    "Germany": "Berlin", "Greece": "Athens", "Hungary": "Budapest", "Iceland": "Reykjavik",
    "India": "Delhi", "Iran": "Tehran", "Ireland": "Dublin", "Italy": "Rome", "Japan": "Tokyo",
    "Kenya": "Nairobi", "Latvia": "Riga", "Norway": "Oslo", "Peru": "Lima", "Poland": "Warsaw",
    "Portugal": "Lisbon", "Romania": "Bucharest", "Spain": "Madrid", "Sweden": "Stockholm",
}  # fmt: skip
