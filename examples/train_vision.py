"""Tune a vision transformer on scikit-learn's digits: ``python examples/train_vision.py``; needs scikit-learn.

It is pretrained on upright digits, in a few seconds, and then tuned to inverted ones, which it cannot read.
"""

import torch
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification

import losia_pro

images, labels = map(torch.tensor, load_digits(return_X_y=True))
pixels = images.view(-1, 1, 8, 8).float() / 8 - 1
held_out = 300


def train(model, optimizer, pixels, steps):
    order = torch.Generator().manual_seed(0)
    for _ in range(steps):
        mine = torch.randint(len(pixels) - held_out, (64,), generator=order)
        model(pixel_values=pixels[mine], labels=labels[mine]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def right(model, pixels):
    with torch.no_grad():
        found = model(pixel_values=pixels[-held_out:]).logits.argmax(-1)
    return f"{(found == labels[-held_out:]).float().mean():.1%}"


torch.manual_seed(0)
config = ViTConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
    image_size=8, patch_size=4, num_channels=1, num_labels=10,
)  # fmt: skip
model = ViTForImageClassification(config)
train(model, torch.optim.AdamW(model.parameters(), lr=3e-3), pixels, steps=120)
print(
    f"the base model: {right(model, pixels)} of digits right, {right(model, -pixels)} of inverted"
)

losia = losia_pro.attach(
    model, losia_pro.LosiaConfig(rank_factor=1 / 4, period=10, output_factor=1.0)
)
optimizer = torch.optim.AdamW(losia.parameters(), lr=1e-2)
losia.bind(optimizer)
train(model, optimizer, -pixels, steps=120)
trained = sum(p.numel() for p in losia.parameters())
losia.detach().save_pretrained("runs/vision")
print(
    f"{trained:,} of {model.num_parameters():,} parameters tuned: {right(model, -pixels)} of inverted right"
)
