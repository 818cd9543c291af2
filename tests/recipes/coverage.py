# %% [markdown]
# # How much of a memory is within reach?
#
# > A template of one's own: no training, one number a run
#
# A row that random inputs never retrieve at the start gets no gradient at the start. Which share of its rows does a memory reach?
# %% tags=["parameters"]
config_path: str = "configs/demo.yaml"  # where everything begins
run_dir: str = ""                       # where everything of this run goes; "" when run by hand
levels: dict = {}                       # what the study varies: axis → level
overrides: dict = {}                    # how the configuration differs from the file
resume: bool = False                    # nothing to continue here: a run takes seconds
# %%
import torch

from peer_nb.config import apply_overrides, load_config, to_dict
from peer_nb.models.causal_lm import PeerMLAConfig, PeerMLAForCausalLM
from peer_nb.models.peer import MemoryLayer
from peer_nb.study.run import Result
# %%
MEASURES = ["memory/coverage"]   # metrics of this template, for the plan: patterns such as "memory/*" are allowed
# %%
cfg = apply_overrides(load_config(config_path), overrides)
torch.manual_seed(cfg.train_config.seed)
model = PeerMLAForCausalLM(PeerMLAConfig(**to_dict(cfg)["model_config"])).eval()
memories = [module for module in model.modules() if isinstance(module, MemoryLayer)]
for memory in memories: memory.collect_usage()
# %%
ids = torch.randint(cfg.model_config.vocab_size, (8, 128))
with torch.no_grad(): model(input_ids=ids, logits_to_keep=1)
reached = [(memory.usage.scores > 0).double().mean().item() for memory in memories]   # share of rows retrieved at all
print(f"{ids.numel():,} tokens reach {', '.join(f'{share:.1%}' for share in reached)} of the rows, layer by layer")
# %%
result = Result(metrics={"memory/coverage": sum(reached)/len(reached)})
if run_dir: result.write(run_dir)
result.metrics
