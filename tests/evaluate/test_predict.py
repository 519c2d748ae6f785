import pytest
import torch
from torch import nn

from limbeck.data import ArrayData
from limbeck.errors import InputError
from limbeck.evaluate.predict import predict
from limbeck.modes import evaluating


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.head = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)
        self.grads = []

    def forward(self, x):
        self.grads.append(torch.is_grad_enabled())
        return self.head(self.drop(self.norm(x)))


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return ArrayData(torch.randn(23, 4, generator=generator), torch.arange(23) % 3, ("a", "b", "c"))


def flags(module):
    return [part.training for part in module.modules()]


def test_logits_are_those_of_eval_mode_whatever_the_batch_size(data):
    net = Net()
    found = [predict(net, data, batch_size=size) for size in (1, 5, 512)]
    with torch.no_grad():
        expected = net.eval()(data.prepare(data.fetch(torch.arange(23))[0]))
    assert found[0].shape == (23, 3)
    for logits in found:
        assert (logits.dtype, logits.device.type, logits.requires_grad) == (torch.float32, "cpu", False)
        torch.testing.assert_close(logits, expected)
    assert not any(net.grads)


def test_the_training_flag_of_every_submodule_comes_back(data):
    net = Net().train()
    net.norm.eval()
    before = flags(net)
    predict(net, data)
    assert flags(net) == before == [True, False, True, True]
    net.eval()
    net.drop.train()
    before = flags(net)
    predict(net, data)
    assert flags(net) == before == [False, False, True, False]


def test_flags_come_back_when_the_forward_pass_fails(data):
    net = Net().train()

    def broken(x):
        assert not net.training
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        predict(net, data, forward=broken)
    assert all(flags(net))


def test_running_statistics_stay_as_they_are(data):
    net = Net()
    before = net.norm.running_mean.clone()
    predict(net, data)
    assert torch.equal(net.norm.running_mean, before)


def test_indices_choose_and_order_the_samples(data):
    net = Net()
    order = torch.tensor([7, 2, 2, 22])
    torch.testing.assert_close(predict(net, data, batch_size=3, indices=order), predict(net, data)[order])


def test_forward_is_called_in_place_of_the_module_in_eval_mode(data):
    net = Net()
    found = predict(net, data, forward=lambda x: net.head(net.drop(x)))
    torch.testing.assert_close(found, net.head(data.inputs).detach())


def test_half_precision_comes_back_as_float32(data):
    assert predict(nn.Identity(), data, forward=lambda x: x.bfloat16()).dtype == torch.float32


def test_values_that_are_not_finite_are_kept(data):
    assert predict(nn.Identity(), data, forward=lambda x: x / 0).isfinite().sum() == 0


def test_an_empty_choice_is_refused(data):
    with pytest.raises(InputError, match="no sample"):
        predict(Net(), data, indices=torch.zeros(0, dtype=torch.long))


def test_evaluating_reaches_modules_that_refuse_train_mode():
    class Frozen(nn.Linear):
        def train(self, mode=True):
            return super().train(False)

    net = nn.Sequential(Frozen(2, 2), nn.Dropout())
    with evaluating(net):
        assert flags(net) == [False, False, False]
    assert flags(net) == [True, True, True]
