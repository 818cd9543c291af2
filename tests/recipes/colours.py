"Which colour does each thing have? A table of pairs with words for keys"
import numpy as np

from peer_nb.tasks.registry import register
from peer_nb.tasks.task import KNOWN, NOVEL, TRAINED, Columns, Mask, Task, permutation

COLOURS = "red green blue black white brown pink grey".split()


def colour_table(
    num_things: int = 32, # things with a colour
    exposures: int = 20, # how often each is shown
    seed: int = 0, # other seeds, other colours
) -> dict[str, Columns]: # train; known and novel with prompt and answer
    "Things and their colours, and as many things that were never shown"
    draw = permutation(2*num_things, seed, "colour_table").tolist()
    prompts = [f"thing {n} is " for n in range(2*num_things)]
    answers = [COLOURS[n % len(COLOURS)] for n in draw]
    rows = dict(prompt=prompts, answer=answers, text=[f"{p}{a}.\n" for p, a in zip(prompts, answers)])
    part = lambda a, b: {name: column[a:b] for name, column in rows.items()}
    return dict(train=dict(text=rows["text"][:num_things]*exposures), known=part(0, num_things), novel=part(num_things, None))


def colour_spans(document: str, **_) -> list[tuple[int, int]]:
    "The colour at the end of a row"
    begin, end = document.rfind(" is ") + 4, document.rfind(".")
    return [(begin, end)] if 4 <= begin < end else []


TASK = register(Task(colour_table, dict(train=TRAINED, known=KNOWN, novel=NOVEL), Mask("colour", colour_spans)))
