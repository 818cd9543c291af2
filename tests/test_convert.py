"A converted layer gives the same outputs as what it came from: other packages' own code where it is installed, published names and plain formulas elsewhere."
import json
import math

import pytest
import torch
import torch.nn.functional as F

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
