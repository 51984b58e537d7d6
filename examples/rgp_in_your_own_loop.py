"""Train with CURE's mask in a plain PyTorch loop: which weights may move, one line per step.

The task is made up (two classes of noisy stripes), so that it runs anywhere in seconds. On a GPU
the same lines run as Triton kernels.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from cure_fast.kernels import RGP, pgd_step_

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
labels = torch.arange(64, device=device) % 2
stripes = (torch.arange(16, device=device) // 2 % 2).expand(64, 1, 16, 16).float()
turned = torch.where(labels.view(-1, 1, 1, 1) == 1, stripes, stripes.transpose(2, 3))
images = (0.6 * turned + 0.4 * torch.rand(turned.shape, device=device)).clamp(0, 1)

model = nn.Sequential(
    nn.Conv2d(1, 8, 3),
    nn.BatchNorm2d(8),
    nn.ReLU(),
    nn.AvgPool2d(14),
    nn.Flatten(),
    nn.Linear(8, 2),
).to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
rgp = RGP(model.named_parameters(), percentile=30, alpha=0.1, scope="conv+bn")

for step in range(50):
    attacked = images.clone()
    for _ in range(3):
        attacked.requires_grad_()
        (grad,) = torch.autograd.grad(cross_entropy(model(attacked), labels), attacked)
        attacked = pgd_step_(attacked.detach(), images, grad, step_size=0.02, eps=0.05)

    natural = cross_entropy(model(images), labels)
    adversarial = cross_entropy(model(attacked), labels)
    g_natural = torch.autograd.grad(natural, rgp.parameters, retain_graph=True)
    g_adversarial = torch.autograd.grad(adversarial, rgp.parameters, retain_graph=True)
    optimizer.zero_grad()
    (natural + adversarial).backward()
    kept = rgp.mask_(g_natural, g_adversarial)  # the masked entries of p.grad are now zero
    optimizer.step()
    if step % 10 == 9:
        total = (natural + adversarial).item()
        print(f"step {step + 1} loss {total:.4f} updated {kept.mean().item():.1%} of each tensor")
