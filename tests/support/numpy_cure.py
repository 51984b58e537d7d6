"""An independent transcription of CURE's equations to NumPy, float64, with hand-written gradients.

The network is a chain of three matrices with biases, written as 1x1 convolutions on 1x1 images in
the PyTorch twin: stem "conv1", block "layer1.0.conv1", classifier "linear", tanh in between.
"""

from __future__ import annotations

import numpy as np

NAMES = (
    "conv1.weight",
    "conv1.bias",
    "layer1.0.conv1.weight",
    "layer1.0.conv1.bias",
    "linear.weight",
    "linear.bias",
)


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def forward(w, x):
    """Logits [N, K] and what the backward pass needs, for images as vectors [N, D]."""
    h1 = np.tanh(x @ w["conv1.weight"].T + w["conv1.bias"])
    h2 = np.tanh(h1 @ w["layer1.0.conv1.weight"].T + w["layer1.0.conv1.bias"])
    return h2 @ w["linear.weight"].T + w["linear.bias"], (x, h1, h2)


def pull_back(w, saved, dz):
    """Gradients of the weights and of the images for a gradient dz [N, K] of the logits."""
    x, h1, h2 = saved
    da2 = (dz @ w["linear.weight"]) * (1 - h2**2)
    da1 = (da2 @ w["layer1.0.conv1.weight"]) * (1 - h1**2)
    grads = {
        "linear.weight": dz.T @ h2,
        "linear.bias": dz.sum(0),
        "layer1.0.conv1.weight": da2.T @ h1,
        "layer1.0.conv1.bias": da2.sum(0),
        "conv1.weight": da1.T @ x,
        "conv1.bias": da1.sum(0),
    }
    return grads, da1 @ w["conv1.weight"]


def ce(z, y):
    """Mean cross-entropy and its gradient in the logits."""
    p, n = softmax(z), len(y)
    onehot = np.eye(z.shape[1])[y]
    return -np.log((p * onehot).sum(1)).mean(), (p - onehot) / n


def kl(z_p, z_q):
    """Batch mean of KL(p || q) and its gradients in both logits."""
    p, q, n = softmax(z_p), softmax(z_q), len(z_p)
    log_ratio = np.log(p) - np.log(q)
    each = (p * log_ratio).sum(1)
    dz_p = p * (log_ratio - each[:, None]) / n
    return each.mean(), dz_p, (q - p) / n


def attack(w, x, start, y, *, eps, step, steps, inner, inner_weight):
    """PGD on the inner objective (Eq. 4, or Algorithm 1's), from the given start."""
    z, _ = forward(w, x)
    x_adv = start.copy()
    for _ in range(steps):
        z_adv, saved = forward(w, x_adv)
        dz = 0.0
        if inner in ("kl", "ce_kl"):
            dz = dz + kl(z, z_adv)[2] * (1 if inner == "kl" else inner_weight)
        if inner in ("ce", "ce_kl"):
            dz = dz + ce(z_adv, y)[1]
        _, dx = pull_back(w, saved, dz)
        x_adv = x_adv + step * np.sign(dx)
        x_adv = np.clip(np.minimum(np.maximum(x_adv, x - eps), x + eps), 0, 1)
    return x_adv


def maskable(layers, stem):
    """Names of the tensors that the mask may touch."""
    chosen = {
        "all_but_classifier": [n for n in NAMES if not n.startswith("linear")],
        "block_conv1": ["layer1.0.conv1.weight", *(["conv1.weight"] if stem else [])],
        "conv": ["conv1.weight", "layer1.0.conv1.weight"],
        "all": list(NAMES),
    }[layers]
    return [n for n in chosen if stem or not n.startswith("conv1")]


def prominence(nat, adv, alpha, score):
    """Eq. 6 and its two variants."""
    if score == "abs":
        return alpha * np.abs(nat) + (1 - alpha) * np.abs(adv)
    total = alpha * nat + (1 - alpha) * adv
    return np.abs(total) if score == "abs_of_sum" else total


def step(w, rev, x, x_adv, y, s):
    """Terms, unmasked gradients, masks (True = may move) and masked gradients of one CURE step.

    ``s`` is a mapping of the settings of CureSettings.
    """
    z, saved = forward(w, x)
    za, saved_a = forward(w, x_adv)
    l_nat, dz_nat = ce(z, y)
    l_adv, dza_adv = ce(za, y)
    l_kl, dz_kl, dza_kl = kl(z, za)
    if s["natural_target"] == "detached":
        dz_kl = np.zeros_like(dz_kl)
    terms = {"natural_ce": l_nat, "adversarial_ce": l_adv, "kl": l_kl}
    dz_cr, dza_cr = np.zeros_like(z), np.zeros_like(za)
    if s["revision"]:
        zr, zra = forward(rev, x)[0], forward(rev, x_adv)[0]
        c1, _, dz_cr = kl(zr, z)
        c2, _, dza_cr = kl(zra, za)
        terms["consistency"] = c1 + c2

    def grads(dz, dza):
        first, second = pull_back(w, saved, dz)[0], pull_back(w, saved_a, dza)[0]
        return {n: first[n] + second[n] for n in NAMES}

    zero = np.zeros_like(z)
    consistency = s["gamma"] * terms.get("consistency", 0.0)
    cr = (s["gamma"] * dz_cr, s["gamma"] * dza_cr)
    if s["objective"] == "rgp":
        terms["total"] = l_nat + l_adv + consistency
        total = grads(dz_nat + cr[0], dza_adv + cr[1])
        nat = adv = total
    else:
        terms["total"] = l_nat + s["beta"] * l_kl + consistency
        total = grads(dz_nat + s["beta"] * dz_kl + cr[0], s["beta"] * dza_kl + cr[1])
        nat = grads(dz_nat, zero)
        adv = grads(zero, dza_adv) if s["score_loss"] == "ce" else grads(dz_kl, dza_kl)
        if s["update"] == "prominence":
            extra = grads(*cr)
            scored = l_adv if s["score_loss"] == "ce" else l_kl
            terms["total"] = s["alpha"] * l_nat + (1 - s["alpha"]) * scored + consistency
            total = {n: s["alpha"] * nat[n] + (1 - s["alpha"]) * adv[n] + extra[n] for n in NAMES}
            # The public code's mode 'all' masks this very sum by its own percentile.
            nat = adv = total
    masks = {}
    if s["rgp"]:
        names = maskable(s["mask_layers"], s["mask_stem"])
        score = "abs" if s["objective"] == "rgp" else s["score"]
        scores = {n: prominence(nat[n], adv[n], s["alpha"], score) for n in names}
        everything = np.concatenate([scores[n].ravel() for n in names])
        for n in names:
            pool = everything if s["mask_scope"] == "global" else scores[n]
            masks[n] = ~(scores[n] < np.percentile(pool, s["percentile"], method="linear"))
    masked = {n: np.where(masks[n], g, 0) if n in masks else g for n, g in total.items()}
    return terms, total, masks, masked


def sgd(w, momenta, grads, masks, *, lr, momentum, weight_decay, hard):
    """SGD with momentum and weight decay; hard freezing leaves masked weights where they are."""
    moved = {}
    for n in NAMES:
        momenta[n] = momentum * momenta[n] + grads[n] + weight_decay * w[n]
        moved[n] = w[n] - lr * momenta[n]
        if hard and n in masks:
            moved[n] = np.where(masks[n], moved[n], w[n])
    return moved


def revise(rev, w, t, *, decay, warmup):
    """Eq. 7 where the coin has landed; t counts steps from 1."""
    d = min(1 - 1 / (t + 1), decay) if warmup else decay
    return {n: d * rev[n] + (1 - d) * w[n] for n in NAMES}
