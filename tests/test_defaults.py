"models/ works as a copied folder, so it repeats the defaults of the schema: here they are held equal."
from dataclasses import MISSING, fields
from typing import get_args, get_type_hints

import pytest

from peer_nb import schema
from peer_nb.models import causal_lm, mla
from peer_nb.models.peer import ACTIVATIONS, MEMORY_KINDS, TABLE_DTYPES, TABLE_GRADIENTS

SECTIONS = [(schema.ModelConfig, causal_lm.PeerMLAConfig), (schema.PeerConfig, causal_lm.PeerOptions), (schema.MLAConfig, causal_lm.MLAOptions),
            (schema.RopeScaling, mla.RopeScaling)]
NESTED = {"peer_config", "mla_config", "rope_scaling"}   # sections of their own; ours come filled
INSTEAD = {"pretrained"}   # of an architecture: a model that is loaded
CHOICES = {"memory_kind": (schema.ModelConfig, MEMORY_KINDS), "activation": (schema.PeerConfig, ACTIVATIONS),
           "table_gradient": (schema.PeerConfig, TABLE_GRADIENTS), "table_dtype": (schema.PeerConfig, TABLE_DTYPES)}


def defaults(section: type) -> dict:
    "Key -> default of a section; MISSING where one must be given"
    return {f.name: f.default_factory() if f.default_factory is not MISSING else f.default for f in fields(section)}


@pytest.mark.parametrize("ours,models", SECTIONS)
def test_the_model_has_the_schemas_defaults(ours, models):
    "Every key of the schema is one of the model's, with the same default"
    wanted, found = defaults(ours), defaults(models)
    nested = NESTED if ours is schema.ModelConfig or ours is schema.MLAConfig else set()
    differing = {key: (value, found.get(key, "no such key")) for key, value in wanted.items() if key not in nested | INSTEAD and found.get(key, "no such key") != value}
    assert not differing, f"{ours.__name__}: (schema, model) of {differing}"


@pytest.mark.parametrize("key", CHOICES)
def test_the_model_knows_the_schemas_choices(key):
    section, known = CHOICES[key]
    assert set(get_args(get_type_hints(section)[key])) == set(known)
