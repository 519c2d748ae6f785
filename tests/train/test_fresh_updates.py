"""An update may ask that its player's optimiser forgets."""

import torch
from torch.nn import functional as F
from toys import plain_student, toy_data

from limbeck.contract import Method, OptimiserSpec, Paper, Phase, Player, Update
from limbeck.train import TrainConfig, Trainer


class Forgetful(Method):
    needs_teacher = False
    paper = Paper(title="", arxiv="", venue="", year=2026)
    forget_at = -1

    def players(self):
        return {"student": Player(self.student, OptimiserSpec(name="sgd", lr=0.1, momentum=0.9))}

    def phases(self):
        return [Phase(steps=2)]

    def updates(self, batch, clock):
        loss = F.cross_entropy(self.student(batch.inputs), batch.targets)
        self.gradients.append(torch.autograd.grad(loss, next(self.student.parameters()), retain_graph=True)[0].clone())
        self.weights.append(next(self.student.parameters()).detach().clone())
        yield Update("student", loss, fresh=clock.step == self.forget_at)


def run(forget_at):
    method = Forgetful().bind(student=plain_student(), train=toy_data(), num_classes=3)
    method.forget_at, method.gradients, method.weights = forget_at, [], []
    Trainer(method, method.train_data, TrainConfig(steps=2, batch_size=8)).fit()
    return method


def test_a_fresh_update_has_no_momentum():
    kept, cleared = run(-1), run(1)
    first = cleared.gradients[0]
    assert first.abs().sum() > 0
    for method, momentum in ((kept, 0.9), (cleared, 0.0)):
        after = next(method.student.parameters()).detach()
        torch.testing.assert_close(method.weights[1] - after, 0.1 * (method.gradients[1] + momentum * first))
