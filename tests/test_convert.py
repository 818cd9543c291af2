"A converted layer gives the same outputs as what it came from: other packages' own code where it is installed, published names and plain formulas elsewhere."
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from peer_nb.analysis.command import main
from peer_nb.analysis.convert import REFUSED, built_layer, converted_model, experts_from_dense, from_foreign, from_meta, from_peer_pytorch, largest_difference
from peer_nb.analysis.worked_example import facts_config
from peer_nb.config import DatasetConfig
from peer_nb.data.corpora import load_tokenizer
from peer_nb.files import UserError
from peer_nb.models.causal_lm import PeerMLAForCausalLM


def model(kind: str, vocabulary: int = 40, **options) -> PeerMLAForCausalLM:
    torch.manual_seed(0)
    memory = dict(num_experts=64, product_key_dim=[8, 8])
    dense = dict(use_peer=False, memory_layers=None, intermediate_size=20) if kind == "dense" else dict(peer_config=memory, memory_kind=kind)
    return PeerMLAForCausalLM(facts_config(vocabulary, 48, **(dict(hidden_size=16, initializer_range=.2) | dense | options))).eval()


@pytest.mark.parametrize("softmax", [True, False])
def test_weights_of_peer_pytorch(softmax):
    theirs = pytest.importorskip("PEER_pytorch").PEER
    torch.manual_seed(0)
    layer = theirs(16, heads=3, num_experts=81, num_experts_per_head=5, dim_key=7, non_competing_scores=not softmax).eval()
    with torch.no_grad(): layer.keys.mul_(50)                                  # scores that matter
    ours = built_layer(16, *from_peer_pytorch(layer.state_dict(), 5 if softmax else 1, "softmax" if softmax else "relu"))
    x = torch.randn(2, 60, 16)
    with torch.no_grad(): assert torch.allclose(ours(x), layer(x), atol=1e-5) and layer(x).abs().max() > .1
    for options, said in ((dict(pre_rmsnorm=True), "pre_rmsnorm"), (dict(separate_embed_per_head=True), "separate_embed_per_head")):
        with pytest.raises(UserError, match=said): from_foreign(theirs(16, heads=2, num_experts=16, **options).state_dict(), 4)


@pytest.mark.parametrize("gated", [True, False])
def test_metas_names_and_shapes(gated):
    "keys [2*heads*n, k/2] seen as [heads, 2, n, k/2]; value_proj(values * silu(swilu_projection(x))); all by enumeration of every row"
    torch.manual_seed(0)
    d, heads, n, k_dim, top = 12, 2, 5, 8, 3
    state = {"keys": torch.randn(2*heads*n, k_dim//2), "values.weight": torch.randn(n*n, d), "query_proj.query_mlps.0.weight": torch.randn(heads*k_dim, d)}
    if gated: state |= {f"{name}.{part}": torch.randn(d, d)*.3 if part == "weight" else torch.zeros(d) for name in ("value_proj", "swilu_projection") for part in ("weight", "bias")}
    x = torch.randn(40, d)
    q, keys = (x @ state["query_proj.query_mlps.0.weight"].T).view(-1, heads, 2, k_dim//2), state["keys"].view(heads, 2, n, k_dim//2)
    scores = torch.einsum("thpc,hpnc->thpn", q, keys)
    every = (scores[:, :, 0, :, None] + scores[:, :, 1, None, :]).flatten(2)     # [t, heads, n*n], the first key counts in n
    best, index = every.topk(top, -1)
    y = torch.einsum("thk,thkd->td", best.softmax(-1), state["values.weight"][index])
    if gated: y = F.linear(y * F.silu(F.linear(x, state["swilu_projection.weight"])), state["value_proj.weight"])
    kind, config, tensors = from_foreign(state, top, heads)
    assert kind == ("memory_plus" if gated else "pkm")
    with torch.no_grad(): assert torch.allclose(built_layer(d, kind, config, tensors)(x), y, atol=1e-4 * y.abs().max().item())
    with pytest.raises(UserError, match="gating.weight: mem_gated=True"): from_meta(state | {"gating.weight": torch.ones(1, d)}, top, heads)
    with pytest.raises(UserError, match="give --heads"): from_foreign(state, top)
    if gated:
        with pytest.raises(UserError, match="a bias other than zero"): from_meta(state | {"value_proj.bias": torch.ones(d)}, top, heads)


def test_a_gated_feed_forward_is_half_of_its_experts():
    torch.manual_seed(0)
    gate, up, down, x = torch.randn(9, 6).double(), torch.randn(9, 6).double(), torch.randn(6, 9).double(), torch.randn(64, 6).double()
    wanted = F.linear(F.silu(x @ gate.T) * (x @ up.T), down)
    read = {k: built_layer(6, "peer", *experts_from_dense(gate, up, down, k))(x).detach() for k in (None, 9, 18, 4)}
    for k in (None, 9, 18): assert torch.allclose(read[k], wanted, atol=1e-10)
    best = (x @ up.T).abs().topk(4).indices                                       # with four read: the four largest |u x|
    kept = torch.zeros(64, 9).double().scatter(1, best, 1.)
    assert torch.allclose(read[4], F.linear(F.silu(x @ gate.T) * (x @ up.T) * kept, down), atol=1e-10)


@pytest.mark.parametrize("kind", ["memory_plus", "dense"])
@pytest.mark.parametrize("tied", [True, False])
def test_whole_models_give_the_same_logits(kind, tied):
    one, ids = model(kind, tie_word_embeddings=tied), torch.randint(0, 40, (3, 30))
    apart, largest = largest_difference(one, converted_model(one, "peer"), ids)
    assert apart < 1e-5 * max(1, largest)


def test_what_has_no_map_is_refused():
    for (kind, to), why in REFUSED.items():
        with pytest.raises(UserError, match="no such map exists"): converted_model(model(kind), to)
    with torch.no_grad():                                                        # the reason, for values: nothing is said at zero but by them
        said = {kind: next(m for m in model(kind).modules() if hasattr(m, "read"))(torch.zeros(1, 16)).abs().max().item() for kind in ("pkm", "peer", "memory_plus")}
    assert said["peer"] == said["memory_plus"] == 0 < said["pkm"]


def test_a_converted_checkpoint_loads_and_says_where_it_came_from(tmp_path, capsys):
    tokenizer = load_tokenizer(DatasetConfig(tokenizer_name="bytes"))
    for part in (model("dense", len(tokenizer)), tokenizer): part.save_pretrained(tmp_path/"dense")
    (tmp_path/"text.txt").write_text("What is converted is compared on this. " * 20)
    command = ["convert", str(tmp_path/"dense"), str(tmp_path/"peer"), "--data", str(tmp_path/"text.txt"), "--window", "32"]
    assert main(command) == 0 and "largest difference of logits" in capsys.readouterr().out
    about = json.loads((tmp_path/"peer"/"converted.json").read_text())
    assert about["source"] == str(tmp_path/"dense") and about["largest_difference"] < 1e-5*about["largest_logit"] and math.isfinite(about["largest_logit"])
    for words, said in ((command, "is there already"), ([*command[:2], str(tmp_path/"x"), "--to", "pkm"], "no such map exists"), (["convert", str(tmp_path/"none"), str(tmp_path/"x")], "no such folder"),
                        ([*command[:2], str(tmp_path/"x"), "--top-k", "99"], "must be from 1 to 40")):
        assert main(words) == 2
        complaint = capsys.readouterr().err
        assert said in complaint and "Traceback" not in complaint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "peer", "text.txt"]


def pkm_state(d: int, heads: int, n: int, width: int) -> dict[str, torch.Tensor]:
    return {"to_queries.weight": torch.randn(2*heads*width, d), "keys": torch.randn(heads, n, 2, width), "values.weight": torch.randn(n*n, d),
            "norm.weight": torch.rand(width) + .5, "norm.bias": torch.randn(width)*.1}


@pytest.mark.parametrize("score", ["softmax", "relu"])
def test_product_key_memory_as_its_paper_and_readme_describe_it(score):
    "Halves of queries lie before heads, each is normed by itself; the n*n sums of every head by enumeration, the k best weighed, their values added"
    torch.manual_seed(0)
    d, heads, n, width, top = 12, 3, 6, 7, 5
    state, x = pkm_state(d, heads, n, width), torch.randn(40, d)
    halves = F.layer_norm((x @ state["to_queries.weight"].T).view(-1, 2, heads, width), (width,), state["norm.weight"], state["norm.bias"])
    one, two = (torch.einsum("thw,hnw->thn", halves[:, p], state["keys"][:, :, p]) for p in (0, 1))
    best, index = (one[..., :, None] + two[..., None, :]).flatten(2).topk(top)
    wanted = torch.einsum("thk,thkd->td", best.softmax(-1) if score == "softmax" else best.relu(), state["values.weight"][index])
    kind, config, tensors = from_foreign(state, top, score=score)
    with torch.no_grad(): got = built_layer(d, kind, config, tensors)(x)
    assert kind == "pkm" and config["query_norm"] == "pieces" and torch.allclose(got, wanted, atol=1e-5 * wanted.abs().max().item())
    for name in ("pre_layernorm.weight", "output_norm.bias", "maybe_concat_combine.2.weight", "norm.fn.weight"):
        with pytest.raises(UserError, match=name): from_foreign(state | {name: torch.ones(1)}, top)


def test_weights_of_product_key_memory():
    theirs = pytest.importorskip("product_key_memory").PKM
    torch.manual_seed(0)
    for gates in (False, True):
        layer = theirs(16, heads=3, num_keys=9, topk=5, dim_head=7, non_competitive_gates=gates).eval()
        with torch.no_grad(): layer.keys.mul_(20)
        ours, x = built_layer(16, *from_foreign(layer.state_dict(), 5, score="relu" if gates else "softmax")), torch.randn(2, 60, 16)
        with torch.no_grad(): assert torch.allclose(ours(x), layer(x), atol=1e-5) and layer(x).abs().max() > .1


def test_a_layer_goes_into_a_checkpoint_and_says_the_same_there(tmp_path, capsys):
    "The oracle reads the tensors of the new checkpoint by their names, and computes the layer from those of the file"
    tokenizer = load_tokenizer(DatasetConfig(tokenizer_name="bytes"))
    for name, kind in (("dense", "dense"), ("memory", "pkm")):
        for part in (model(kind, len(tokenizer)), tokenizer): part.save_pretrained(tmp_path/name)
    torch.manual_seed(1)
    state = pkm_state(16, 2, 5, 4)
    save_file(state, tmp_path/"layer.safetensors")
    into = lambda where, *words: ["convert", str(tmp_path/"layer.safetensors"), str(tmp_path/"new"), "--into", str(tmp_path/where), *words]
    assert main(into("memory", "--top-k", "3")) == 0 and "says what it said alone" in capsys.readouterr().out
    about, held = json.loads((tmp_path/"new"/"converted.json").read_text()), load_file(tmp_path/"new"/"model.safetensors")
    assert about["layer"] == 1 and about["largest_difference"] <= 1e-5*about["largest_output"] and about["logits_moved"] > .1
    assert torch.equal(held["model.layers.1.memory.values.weight"], state["values.weight"]) and torch.equal(held["model.layers.1.memory.query_norm.weight"], state["norm.weight"])
    before = load_file(tmp_path/"memory"/"model.safetensors")
    assert all(torch.equal(held[name], before[name]) for name in held if ".layers.1.memory." not in name)
    for words, said in ((into("dense", "--top-k", "3"), "give --layer"), (into("dense", "--top-k", "3", "--layer", "9"), "layers 0 to 1"), (into("memory"), "give --top-k"),
                        (into("memory", "--top-k", "4", "--layer", "0"), "is 4 in the new layer"), (into("none", "--top-k", "3"), "no such folder"),
                        (["convert", str(tmp_path/"memory"), str(tmp_path/"x"), "--layer", "1"], "--layer 1: is for a layer that goes --into")):
        if "new" in words[2]: words = [*words[:2], str(tmp_path/"x"), *words[3:]]
        if "is 4 in" in said: words = [w.replace("memory", "new") if w.endswith("/memory") else w for w in words]
        assert main(words) == 2
        complaint = capsys.readouterr().err
        assert said in complaint and "Traceback" not in complaint, complaint
    assert not (tmp_path/"x").exists()
