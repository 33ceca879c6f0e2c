"""transformers' Trainer on the tokens of an llmctl prep: AdamW, torch.compile, bf16, a cosine schedule.

    python docs/bench/trainer.py RUN/prep --steps 1900 [--learning-rate 1e-3]

The opponent of docs/benchmarks.md's books: the same tokens, the same windows, a Llama of the same shape. Prints the
bits per byte of the whole validation split, scored as `llmctl pretrain` scores it, and the process's seconds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

START = time.perf_counter()  # the imports below are part of a process's seconds

import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments  # noqa: E402

from llmctl.inference import scoring  # noqa: E402
from llmctl.model import hf  # noqa: E402
from llmctl.text.shards import Shards  # noqa: E402
from llmctl.text.tokenizer import Tokenizer  # noqa: E402

LENGTH, BATCH = 256, 8


class Windows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The training split in windows, which the Trainer shuffles."""

    def __init__(self, split: Shards) -> None:
        self.split, self.count = split, (len(split) - 1) // LENGTH

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.split[index * LENGTH : (index + 1) * LENGTH + 1])
        return {"input_ids": ids, "labels": ids}  # the model shifts the labels by itself


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("prep", type=Path)
    arguments.add_argument("--steps", type=int, required=True)
    arguments.add_argument("--learning-rate", type=float, default=1e-3)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--out", type=Path, default=Path("runs/trainer"))
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    tokenizer = Tokenizer.load(given.prep)
    train, val = Shards.open(given.prep, "train"), Shards.open(given.prep, "val")
    torch.manual_seed(1)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=LENGTH + 1,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    model = LlamaForCausalLM(shape)
    settings = TrainingArguments(
        output_dir=str(given.out),
        per_device_train_batch_size=BATCH,
        max_steps=given.steps,
        learning_rate=given.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(10, given.steps // 50),
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=True,
        torch_compile=True,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=100,
        seed=1,
    )
    Trainer(model, settings, train_dataset=Windows(train)).train()
    model.save_pretrained(given.out)
    found = scoring.score(hf.load_causal(given.out), val[:], max_seq_length=LENGTH, bytes_=val.bytes)
    seconds = time.perf_counter() - START
    tokens = given.steps * BATCH * LENGTH
    print(f"{found.bits_per_byte:.4f} bits/byte, loss {found.loss:.4f}, {tokens:,} tokens, {seconds:.0f} s")


if __name__ == "__main__":
    main()
