"""MiniMind's LoRA walk-through, its steps in order, with this package's imports."""

from __future__ import annotations

import json
import math

import torch
from torch import nn
from torch.utils.data import DataLoader

from lora_kernels import apply_lora, load_lora, save_lora
from minimind import LMConfig, MiniMindLM, SFTDataset, load_tokenizer


class TestModel(nn.Module):
    __test__ = False

    def __init__(self):
        super().__init__()
        self.linear1 = nn.Linear(64, 64)
        self.linear2 = nn.Linear(64, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.linear2(self.linear1(x)))


SAMPLES = [
    ("你好，你是谁？", "我是知更鸟，很高兴认识你。"),
    ("What is LoRA?", "LoRA adds two small matrices beside a large one and trains only those."),
]


def learning_rate(step, total, lr):
    return lr / 10 + lr / 2 * (1 + math.cos(math.pi * step / total))


def test_walkthrough(tmp_path, capsys):
    # 1. LoRA on a model of a few linears: the square ones are announced.
    test_model = TestModel()
    x = torch.randn(3, 64)
    base_output = test_model(x)
    apply_lora(test_model)
    assert capsys.readouterr().out.splitlines() == [
        "apply lora on module: linear1",
        "apply lora on module: linear2",
    ]
    assert torch.equal(test_model(x), base_output)

    # 2. Save the LoRA weights, load them into another copy of the model.
    nn.init.normal_(test_model.linear1.lora.B.weight, std=0.1)
    save_lora(test_model, tmp_path / "test_lora.pth")
    saved = torch.load(tmp_path / "test_lora.pth", weights_only=True)
    assert sorted(saved) == [f"linear{i}.lora.{f}.weight" for i in (1, 2) for f in "AB"]
    twin = TestModel()
    twin.load_state_dict({k: v for k, v in test_model.state_dict().items() if "lora" not in k})
    apply_lora(twin, verbose=False)
    load_lora(twin, tmp_path / "test_lora.pth")
    assert torch.equal(twin(x), test_model(x)) and not torch.equal(twin(x), base_output)

    # 3. MiniMind of two layers, LoRA of rank 16 on its square linears.
    torch.manual_seed(0)
    config = LMConfig(dim=512, n_layers=2, max_seq_len=512, use_moe=False)
    model = MiniMindLM(config)
    apply_lora(model, rank=16)
    assert capsys.readouterr().out.splitlines() == [
        f"apply lora on module: layers.{i}.attention.{name}"
        for i in (0, 1)
        for name in ("wq", "wo")
    ]
    total = sum(p.numel() for p in model.parameters())
    lora = sum(p.numel() for name, p in model.named_parameters() if "lora" in name)
    assert (total, lora, f"{lora / total:.2%}") == (8_980_992, 65_536, "0.73%")

    # 4. Freeze everything else by name.
    for name, parameter in model.named_parameters():
        if "lora" not in name:
            parameter.requires_grad = False
    lora_parameters = [p for name, p in model.named_parameters() if "lora" in name]
    assert sum(p.requires_grad for p in model.parameters()) == len(lora_parameters) == 8
    frozen = {n: p.clone() for n, p in model.named_parameters() if "lora" not in n}

    # 5. The schedule.
    epochs, lr = 5, 5e-4
    rates = [f"{learning_rate(step, epochs, lr):.8f}" for step in range(1, epochs + 1)]
    assert rates == ["0.00050225", "0.00037725", "0.00022275", "0.00009775", "0.00005000"]

    # 6. Two samples through the training loop.
    data = tmp_path / "lora_identity.jsonl"
    turns = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in SAMPLES
    ]
    data.write_text(
        "".join(json.dumps({"conversations": t}, ensure_ascii=False) + "\n" for t in turns),
        encoding="utf-8",
    )
    dataset = SFTDataset(str(data), load_tokenizer(), max_length=512)
    loader = DataLoader(dataset, batch_size=2)
    optimizer = torch.optim.AdamW(lora_parameters, lr=lr)
    cross_entropy = nn.CrossEntropyLoss(reduction="none")
    losses = []
    model.train()
    for epoch in range(epochs):
        for step, (tokens, targets, loss_mask) in enumerate(loader, start=1):
            rate = learning_rate(epoch * len(loader) + step, epochs * len(loader), lr)
            for group in optimizer.param_groups:
                group["lr"] = rate
            result = model(tokens)
            per_token = cross_entropy(result.logits[:, :-1].transpose(1, 2), targets[:, 1:])
            mask = loss_mask[:, 1:]
            logits_loss = (per_token * mask).sum() / mask.sum()
            loss = logits_loss + result.aux_loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(lora_parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            print(
                f"Epoch:[{epoch + 1}/{epochs}]({step}/{len(loader)}), loss: {loss.item():.4f}, "
                f"logits_loss: {logits_loss.item():.4f}, aux_loss: {result.aux_loss.item():.4f}, "
                f"lr: {rate:.8f}"
            )
    log = capsys.readouterr().out.splitlines()
    assert len(log) == 5 and log[0].startswith("Epoch:[1/5](1/1), loss: 8.")
    assert log[0].endswith("aux_loss: 0.0000, lr: 0.00050225")
    assert all(b < a for a, b in zip(losses, losses[1:], strict=False)), losses
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)

    # 7. The file holds the LoRA weights and nothing else, and gives the same model.
    path = tmp_path / "out" / "lora_identity_512.pth"
    save_lora(model, path)
    weights = torch.load(path, weights_only=True)
    assert sum(t.numel() for t in weights.values()) == 65_536
    fresh = MiniMindLM(config)
    fresh.load_state_dict(frozen, strict=False)
    load_lora(fresh, path)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(tokens).logits, model.eval()(tokens).logits)
