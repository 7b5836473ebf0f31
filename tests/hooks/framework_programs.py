"""Trainings by frameworks, as people write them: each prints, as one line of JSON, what the framework itself says.

``# lens`` stands where a line of lens goes, ``CALLBACKS`` where a callback goes.
"""

from __future__ import annotations

_MIXTRAL = """
import json
import torch
from transformers import MixtralConfig, MixtralForCausalLM

def small_mixtral():
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ))

def told(trainer):
    history = trainer.state.log_history
    return json.dumps({
        "steps": trainer.state.global_step,
        **{name: [[entry["step"], entry[name]] for entry in history if name in entry]
           for name in ("loss", "learning_rate", "grad_norm", "epoch", "eval_loss", "num_tokens", "reward")},
    })
"""

_TOKENIZER = """
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(60))]
raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
)
"""

TRANSFORMERS = (
    _MIXTRAL
    + """
from transformers import Trainer, TrainingArguments
# lens
torch.manual_seed(1)
rows = [{"input_ids": row, "labels": row} for row in (torch.randint(3, 64, (16,)) for _ in range(64))]
def train(until, checkpoint=None):
    arguments = TrainingArguments(
        "out", per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=until, report_to=[],
        use_cpu=True, disable_tqdm=True, logging_steps=1, eval_strategy="steps", eval_steps=3, save_steps=2,
        learning_rate=1e-3, lr_scheduler_type="linear",
    )
    trainer = Trainer(small_mixtral(), arguments, train_dataset=rows, eval_dataset=rows[:4], callbacks=CALLBACKS)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer
print(told(train(6)))
"""
)
RESUMED = TRANSFORMERS.replace("print(told(train(6)))", 'print(told(train(7, "out/checkpoint-4")))')

SFT = (
    _MIXTRAL
    + _TOKENIZER
    + """
from trl import SFTConfig, SFTTrainer
# lens
rows = Dataset.from_list([{"text": " ".join(f"w{(number * 7 + at) % 60}" for at in range(12))} for number in range(32)])
arguments = SFTConfig(
    "out", per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4, report_to=[], use_cpu=True,
    disable_tqdm=True, logging_steps=1, eval_strategy="steps", eval_steps=2, save_steps=2, max_length=16,
    gradient_checkpointing=False, bf16=False,
)
trainer = SFTTrainer(
    small_mixtral(), arguments, train_dataset=rows, eval_dataset=rows.select(range(4)), processing_class=tokenizer,
    callbacks=CALLBACKS,
)
trainer.train()
print(told(trainer))
"""
)

GRPO = (
    _MIXTRAL
    + _TOKENIZER
    + """
from trl import GRPOConfig, GRPOTrainer
# lens
def longer_is_better(completions, **_):
    return [len(completion) / 100 for completion in completions]

rows = Dataset.from_list([{"prompt": f"w{number} w{number + 1} w{number + 2}"} for number in range(32)])
arguments = GRPOConfig(
    "out", per_device_train_batch_size=4, num_generations=4, max_completion_length=8, max_steps=3, report_to=[],
    use_cpu=True, disable_tqdm=True, logging_steps=1, save_strategy="no", beta=0.0, gradient_checkpointing=False,
    bf16=False,
)
trainer = GRPOTrainer(
    small_mixtral(), longer_is_better, arguments, train_dataset=rows, processing_class=tokenizer,
    callbacks=CALLBACKS,
)
trainer.train()
print(told(trainer))
"""
)

LIGHTNING = """
import json
import logging
import warnings
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
# lens
class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        self.losses, self.rates = [], []

    def forward(self, batch):
        return self.body(batch).pow(2).mean()

    def training_step(self, batch, number):
        loss = self(batch)
        self.log("train_loss", loss)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, number):
        self.log("val_loss", self(batch))

    def on_before_optimizer_step(self, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

torch.manual_seed(0)
net = Net()
data = torch.randn(48, 8)
saves = ModelCheckpoint("saved", every_n_train_steps=3, save_top_k=-1)
trainer = pl.Trainer(
    max_epochs=1, accumulate_grad_batches=2, accelerator="cpu", logger=False, enable_progress_bar=False,
    enable_model_summary=False, log_every_n_steps=1, val_check_interval=6, callbacks=[saves, *CALLBACKS],
)
trainer.fit(net, torch.utils.data.DataLoader(data, 4), torch.utils.data.DataLoader(data[:8], 4))
print(json.dumps({
    "steps": trainer.global_step, "losses": net.losses, "rates": net.rates,
    "val_loss": float(trainer.callback_metrics["val_loss"]), "train_loss": float(trainer.callback_metrics["train_loss"]),
}))
"""

ACCELERATE = """
import json
import torch
from accelerate import Accelerator
# lens
torch.manual_seed(0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, log_with=CALLBACKS)
accelerator.init_trackers("run", config={"lr": 0.01})
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
loader = torch.utils.data.DataLoader(torch.randn(48, 8), batch_size=4)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
losses, rates, steps = [], [], 0
for batch in loader:
    with accelerator.accumulate(model):
        loss = model(batch).pow(2).mean()
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    if accelerator.sync_gradients:
        steps += 1
        losses.append(loss.item())
        accelerator.log({"loss": loss.item(), "lr": rates[-1]}, step=steps)
        if steps % 3 == 0:
            accelerator.save_state(f"saved/{steps}")
accelerator.end_training()
print(json.dumps({"steps": steps, "losses": losses, "rates": rates}))
"""

MEGATRON = """
import json
import time
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.timers import Timers

torch.cuda.synchronize = lambda *_: None  # all that keeps its timers from a machine without a card
dist.init_process_group("gloo")
parallel_state.initialize_model_parallel(
    tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=1)
torch.manual_seed(0)
timers = Timers(2, "minmax")
model = torch.nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for step in range(3):
    timers("batch-generator", log_level=2).start()
    batch = torch.randn(4, 8)
    timers("batch-generator").stop()
    timers("forward-compute", log_level=2).start()
    loss = model(batch).pow(2).mean()
    timers("forward-compute").stop()
    timers("backward-compute", log_level=2).start()
    torch.autograd.Variable._execution_engine.run_backward(  # as its schedules do
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True)
    timers("backward-compute").stop()
    for group in (
        parallel_state.get_data_parallel_group(with_context_parallel=True),
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_expert_model_parallel_group(),
        parallel_state.get_expert_data_parallel_group(),
    ):
        dist.all_reduce(model.weight.grad, group=group)
    timers("optimizer", log_level=1).start()
    optimizer.step()
    optimizer.zero_grad()
    timers("optimizer").stop()
    timers("save-checkpoint", log_level=0).start()
    time.sleep(0.01)
    timers("save-checkpoint").stop()
    last = loss.item().hex()
if dist.get_rank() == 0:
    print(json.dumps({"loss": last, "dp": parallel_state.get_data_parallel_world_size()}))
dist.destroy_process_group()
"""
