"""A method's terms where each network answers known images with known logits, in float64."""

from __future__ import annotations

import torch

import tiny_step

CLASSES = 5


class Known:
    """Answers images that it knows by the logits given for them, and no others."""

    def __init__(self, answers):
        self.answers = answers
        self.seen = []

    def __call__(self, x):
        (name,) = [n for n, (images, _) in self.answers.items() if torch.equal(images, x)]
        self.seen.append(name)
        return self.answers[name][1]


class Step:
    """Images, labels, and the logits of the student and of teachers by what they see.

    ``sees`` has the names of images by network: ``natural``, ``adversarial``, or further ones,
    whose images are given.
    """

    def __init__(self, sees, *, count=48, scale=2.0, **further):
        self.y = torch.randint(CLASSES, (count,))
        images = torch.rand(2, count, 3, 2, 2, dtype=torch.float64).unbind()
        self.images = dict(zip(("natural", "adversarial"), images, strict=True))
        self.images |= {name: make(*images) for name, make in further.items()}
        self.logits = {
            network: {
                name: (scale * torch.randn(count, CLASSES, dtype=torch.float64)).requires_grad_()
                for name in names
            }
            for network, names in sees.items()
        }

    def known(self, network):
        logits = self.logits[network]
        return Known({name: (self.images[name], z) for name, z in logits.items()})

    def terms(self, method, *, epoch=0, **settings):
        """The terms of the method's loss; all networks must have seen what they have logits for."""
        run = tiny_step.tiny_run(method, **settings)
        run.epoch = epoch
        run.model = self.known("model")
        run.teachers = {name: self.known(name) for name in run.method.teachers}
        batch = tiny_step.batch_of(self.images["natural"], self.y)
        terms = run.method.loss(run, batch.attacked(self.images["adversarial"]))
        for network, asked in (("model", run.model), *run.teachers.items()):
            assert sorted(asked.seen) == sorted(self.logits[network]), network
        return terms

    def gradients(self, total):
        """Gradients by the student's logits, zero where there is none."""
        logits = [*self.logits["model"].values()]
        options = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
        return torch.autograd.grad(total, logits, **options)

    def assert_equal(self, total, expected):
        """Values, and gradients by the student's logits."""
        torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
        for found, wanted in zip(self.gradients(total), self.gradients(expected), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-14)
