"""The tests, in the order of the paper: each against a closed form, a finite difference in float64, a count from the
paper or an independent recomputation, and last the scripts as a user runs them. One wants MNIST, in MNIST_DIR."""
import copy
import csv
import functools
import gzip
import hashlib
import json
import math
import os
import re
import struct
import subprocess
import sys
import xml.etree.ElementTree
import zlib
from pathlib import Path
from unittest import mock

import eval as evaluation  # eval is a builtin; before torch, because it silences torch's warning that numpy is missing

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import train
from advcritic import (GaussianNoise, RunningConfidence, attack, attack_step, boundaries, classifier_loss,
                       closest_class, critic, critic_loss, gradient_penalty, lenet, mlp, train_step, uniform_class)
from eval import carlini_wagner, ddn, deepfool, high_confidence_attack, measure, paper_attack

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)


def smooth():
    """With second derivatives everywhere, so that finite differences converge, and sure of itself, for the attacks."""
    f = nn.Sequential(nn.Flatten(), nn.Linear(64, 7), nn.Tanh(), nn.Linear(7, 5)).double()
    f[3].weight.data *= 10
    return f


def jacobians(f, x):
    """f's logits (N,K) and their gradients (N,K,d), image by image, by torch's own function."""
    return f(x), torch.stack([torch.autograd.functional.jacobian(f, image[None])[0].flatten(1) for image in x])


def distances(f, x, y):
    """From each image to the boundary between y and each class of f linearised there: (N,K), inf at y."""
    (z, W), n = jacobians(f, x), torch.arange(len(x))
    distance = (z - z[n, y, None]).abs() / (W - W[n, y, None]).norm(dim=2)
    return distance.scatter(1, y[:, None], math.inf).detach()


def check_gradient(function, weights, surrogate=None):
    """The gradient of function() with respect to weights is surrogate()'s, its own, by central differences."""
    grads = torch.autograd.grad(function(), weights, materialize_grads=True)
    direction, values = [torch.randn_like(weight) for weight in weights], []
    for h in (1e-6, -2e-6):  # to one side, and from there to the other
        for weight, d in zip(weights, direction):
            weight.data += h * d
        values.append((surrogate or function)().item())
    by_backward = sum((g * d).sum().item() for g, d in zip(grads, direction))
    assert by_backward == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5) != 0


def assert_same(weights, *values, **tolerance):
    """Two scalars are the same and have the same gradient with respect to weights."""
    torch.testing.assert_close(*values, **tolerance)
    g, h = (torch.autograd.grad(value, weights, retain_graph=True) for value in values)
    torch.testing.assert_close(g, h, **tolerance)


# --- The networks; Eqs. 4 to 7, Algorithm 1 and the training step -------------------------------------------------

def test_networks_layer_by_layer():
    """The critic has noise on the input of each layer, in training alone, and leaky ReLU after the hidden ones."""
    x, f, D, g = torch.rand(3, 1, 28, 28), mlp(), critic(), lenet()
    for net, count in ((f, 3_836_410), (D, 2_395_210), (g, 582_026)):
        assert sum(p.numel() for p in net.parameters()) == count
        for layer in (layer for layer in net if hasattr(layer, "weight")):  # He: variance 2 / fan-in
            assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / layer.weight[0].numel()), rel=0.1)
            assert layer.bias.abs().max() == 0
    conv1, conv2, dense, last = (layer for layer in g if hasattr(layer, "weight"))
    h = F.max_pool2d(F.relu(conv2(F.max_pool2d(F.relu(conv1(x)), 2))), 2)
    torch.testing.assert_close(g(x), last(F.relu(dense(h.flatten(1)))))
    for net, noise, slope in ((f, [0] * 4, 0), (D, [0.1, 0.5, 0.5], 0.2), (copy.deepcopy(D).eval(), [0] * 3, 0.2)):
        state, h = torch.get_rng_state(), x.flatten(1)
        found = net(x)
        torch.set_rng_state(state)
        for layer, std in zip((layer for layer in net if isinstance(layer, nn.Linear)), noise, strict=True):
            h = layer(h + std * torch.randn_like(h))
            if layer.out_features > 10:
                h = F.leaky_relu(h, slope)
        torch.testing.assert_close(found, h)


def test_conv_pool_is_convolution_and_pooling_with_their_derivatives():
    conv, x, cotangent = nn.Conv2d(1, 32, 5).double(), torch.randint(3, (20, 1, 28, 28)), torch.randn(20, 32, 12, 12)
    conv.weight.data.normal_(0, 2).round_()  # whole numbers: equal values of a pooling window are equal to the bit
    x[:10] = (torch.arange(28) + torch.arange(28)[:, None]) // 7 % 3  # a whole window is equal, or a diagonal of it
    outcomes = []
    for layer in (nn.Sequential(conv, nn.MaxPool2d(2)), evaluation.ConvPool(conv)):
        x_i = x.double().requires_grad_()
        y = layer(x_i)
        grad, = torch.autograd.grad((y * cotangent).sum(), x_i, create_graph=True)
        outcomes.append((y, grad, *torch.autograd.grad(grad.square().sum() + y.square().sum(), layer.parameters())))
    torch.testing.assert_close(*outcomes, rtol=1e-10, atol=1e-10)
    assert [type(evaluation.network("lenet", on)[0]) for on in ("cpu", "meta")] == [evaluation.ConvPool, nn.Conv2d]


def test_critic_loss_and_its_gradient():
    """On a critic that is not linear, with noise: its gradients differ from place to place and from draw to draw."""
    D, (x, x_adv), (y, y_adv) = smooth(), torch.rand(2, 3, 1, 8, 8).double(), torch.tensor([[0, 1, 2], [1, 2, 3]])
    noisy, state, expected = nn.Sequential(nn.Flatten(), GaussianNoise(0.5), *D[1:]), torch.get_rng_state(), 0
    for where, label, sign in ((x, y, -1), (x_adv, y_adv, 1)):
        z, W = (of_all[range(3), label] for of_all in jacobians(D, where + 0.5 * torch.randn_like(where)))
        expected += (1 + (sign * z).exp()).log().mean() + 7 * (W.norm(dim=1) - 1).square().mean()
    torch.set_rng_state(state)
    torch.testing.assert_close(critic_loss(noisy, x, y, x_adv, y_adv, lambda_grad=7), expected)
    x.requires_grad_()
    assert torch.autograd.grad(critic_loss(D, x, y, 1 * x, y_adv), x, allow_unused=True) == (None,)  # both detached
    check_gradient(lambda: critic_loss(D, x, y, x_adv, y_adv), list(D.parameters()))
    flat = gradient_penalty(0 * D(x)[:, 0], x)  # its gradient is 0, where the root has no derivative
    assert flat.item() == pytest.approx(1, rel=1e-5) and torch.autograd.grad(flat, D[1].weight)[0].isfinite().all()


def test_classifier_loss_image_by_image():
    f, D, x = smooth(), smooth(), torch.rand(8, 1, 8, 8).double()
    label, weights = f(x).argmax(1), list(f.parameters())
    y, C = (label + torch.arange(8) % 2) % 5, torch.linspace(0.1, 0.95, 8)
    x_adv = attack(f, x, closest_class(f, x, label), C, create_graph=True)
    y_adv, nll, fool, cycle = f(x_adv).argmax(1), F.cross_entropy(f(x), y), [], []
    loss, parts = classifier_loss(f, D, x, y, x_adv, y_adv, lam=0.3, lambda_rec=0.02)
    for i in (y_adv != label).nonzero().flatten():
        fool.append(-torch.sigmoid(D(x_adv[i:i + 1])[0, y_adv[i]]).log())
        x_rec = attack(f, x_adv[i:i + 1].detach(), label[i:i + 1], f(x[i:i + 1]).softmax(1).max(), create_graph=True)
        cycle.append((x_rec - x[i]).square().sum())
    assert 0 < len(fool) < 8  # otherwise this shows nothing
    success, fool, cycle = torch.tensor(len(fool) / 8).double(), sum(fool) / len(fool), sum(cycle) / len(cycle)
    torch.testing.assert_close(parts, dict(nll=nll, fool=fool, cycle=cycle, success=success))
    assert_same(weights, loss, nll + 0.3 * fool + 0.02 * cycle)  # also through the confidence of the way back
    x_adv = attack(f, x, label, 1e-6, create_graph=True)  # reached from the start: x_adv = x, no attack succeeds
    loss, parts = classifier_loss(f, D, x, y, x_adv, label, lam=0.5)
    assert (parts["fool"], parts["cycle"], parts["success"]) == (0, 0, 0)
    assert_same(weights, loss, nll)


def walk(f, x, target, C, frozen=None):
    """Algorithm 1 in four steps, by another route than attack's. Returns x_adv, and (x_i, sigmoid, indicator) of each
    step. With those of an earlier walk as frozen it is what the gradient sees: the points x_i stay as they were, f's
    present weights enter through w and log p, and an indicator is its old value plus the change of its sigmoid."""
    r, go, trace = torch.zeros_like(x), torch.ones(len(x)).double(), []
    for i in range(4):
        x_i = (frozen[i][0] if frozen else x + 1.05 * r).requires_grad_()
        log_p = -F.cross_entropy(f(x_i), target, reduction="none")
        w = torch.autograd.grad(log_p.sum(), x_i)[0].flatten(1)
        norm = (w.pow(2).sum(1) + 1e-8).sqrt()
        p = log_p.exp().detach()
        trace.append((x_i.detach(), torch.sigmoid(C - p), (p < C).double()))
        go = go * (frozen[i][2] + trace[i][1] - frozen[i][1] if frozen else trace[i][2])
        r = r + ((go * (1e-4 + (C.log() - log_p.detach()).abs() / norm) / norm)[:, None] * w).view_as(x)
    return x + 1.05 * r, trace


def test_gradient_of_the_attack_with_respect_to_weights_and_confidence():
    f, x, C = smooth(), torch.rand(12, 1, 8, 8).double(), torch.tensor([1, 0.6, 0.9] * 4).double().requires_grad_()
    target, v = closest_class(f, x, f(x).argmax(1)), torch.randn_like(x)
    x_adv, trace = walk(f, x, target, C)
    assert torch.stack([below for _, _, below in trace]).prod(0).unique().numel() == 2  # some reach C, some do not
    x.requires_grad_()
    for create_graph in (False, True):
        found = attack(f, x, target, C, steps=4, create_graph=create_graph)
        assert torch.allclose(found, x_adv, rtol=0, atol=1e-12) and found.requires_grad == create_graph
    assert torch.autograd.grad(found.sum(), x, retain_graph=True, allow_unused=True) == (None,)  # x is a constant
    assert attack(f, x, target, C.float()).dtype == x.dtype
    check_gradient(lambda: (found * v).sum(), [*f.parameters(), C], lambda: (walk(f, x, target, C, trace)[0] * v).sum())


def test_train_step_by_hand():
    """SGD on both losses, the critic first; the attack is to its target's confidence after this batch's update."""
    f, D, x, y = smooth(), smooth(), torch.rand(12, 1, 8, 8).double(), torch.arange(12) % 5
    f[1].bias.requires_grad_(False)
    D[3].requires_grad_(False)
    f_new, D_new = copy.deepcopy((f, D))
    of_f, of_D, of_f_new, of_D_new = (torch.optim.SGD(net.parameters(), lr=0.2) for net in (f, D, f_new, D_new))
    confidence, mean = RunningConfidence(5), torch.tensor([0.01, 0.6, 0.7, 0.01, 0.9])
    assert confidence.mean.tolist() == [1] * 5
    confidence.mean.copy_(mean)
    found = train_step(f, D, confidence, of_f, of_D, x, y, lam=0.7, lambda_rec=0.2, lambda_grad=2, steps=3)
    probability, label = f_new(x).detach().softmax(1).max(1)
    for k in label.unique():
        mean[k] = 0.5 * mean[k] + 0.5 * probability[label == k].mean()
    target = closest_class(f_new, x, label)
    x_adv = attack(f_new, x, target, mean[target], steps=3, create_graph=True)
    y_adv = f_new(x_adv).argmax(1)
    loss_D = critic_loss(D_new, x, y, x_adv, y_adv, lambda_grad=2)
    loss_D.backward()
    of_D_new.step()
    grad_D = D_new[1].weight.grad.clone()
    loss_f, parts = classifier_loss(f_new, D_new, x, y, x_adv, y_adv, lam=0.7, lambda_rec=0.2, steps=3)
    loss_f.backward()
    of_f_new.step()
    torch.testing.assert_close([*f.parameters(), *D.parameters()], [*f_new.parameters(), *D_new.parameters()])
    torch.testing.assert_close(found, {**parts, "critic": loss_D.detach()})
    assert 0 < parts["success"] < 1 and torch.allclose(confidence.mean, mean) and label.unique().numel() < 5
    assert not any(part.requires_grad for part in found.values())
    torch.testing.assert_close(D[1].weight.grad, grad_D)  # the classifier's step left nothing in the critic


def test_train_step_refuses_what_does_not_match():
    f, D, x, y = smooth(), smooth(), torch.rand(12, 1, 8, 8).double(), torch.arange(12) % 5
    of_f, of_D, of_a_copy = (torch.optim.SGD(net.parameters(), lr=0.1) for net in (f, D, copy.deepcopy(f)))
    unreached, shapes = "depends on none of the optimizer's weights", "do not match 12 images"
    for classes, adam_f, adam_D, labels, says in (
            (5, of_D, of_f, y, unreached), (5, of_a_copy, of_D, y, unreached), (5, of_f, of_a_copy, y, unreached),
            (4, of_f, of_D, y, shapes), (5, of_f, of_D, y[:, None], shapes), (5, of_f, of_D, y[:11], shapes)):
        with pytest.raises(ValueError, match=says):
            train_step(f, D, RunningConfidence(classes), adam_f, adam_D, x, labels, lam=0.5)
    before = copy.deepcopy(D.state_dict())
    train_step(f, D.requires_grad_(False), RunningConfidence(5), of_f, of_D, x, y, lam=0.5)
    torch.testing.assert_close(D.state_dict(), before)  # a player that is frozen does not move


@pytest.mark.parametrize("defense", ["critic", *train.BASELINES])
def test_a_step_waits_for_nothing(monkeypatch, defense):
    """On the meta device, which has no values: a step reads none back and copies no number to it (torch.where may)."""
    class OnlyMeta(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            assert all(value.is_meta for value in (*args, found) if isinstance(value, torch.Tensor)), function
            assert function not in (torch.ops.aten.scalar_tensor.default, torch.ops.aten.lift_fresh.default), function
            return found
    monkeypatch.setattr(train, "adam", lambda net, lr, betas: torch.optim.SGD(net.parameters(), lr, foreach=False))
    run = train.start(train.parse_flags(["--defense", defense])[1], "meta")
    x, y = torch.rand(10, 1, 28, 28, device="meta"), torch.zeros(10, dtype=torch.int64, device="meta")
    for epoch in (0, 1):
        with OnlyMeta():
            parts = train.step(run, epoch, x, y)
        assert all(part.is_meta and part.shape == () for part in parts.values())


# --- Section 5: the other defenses, the schedule, the attacks of the evaluation -----------------------------------

def test_losses_of_the_other_defenses():
    """On a linear model KL(p(x) || p(x + d)) is d^T H d / 2 + O(d^3), H = W^T (diag p - p p^T) W: VAT's power step."""
    f, x, state = nn.Linear(64, 5).double(), torch.rand(6, 64).double(), torch.get_rng_state()
    y, z, W, weights = torch.arange(6) % 5, f(x), f.weight, list(f.parameters())
    p = z.detach().softmax(1)
    x_adv = x + 0.1 * ((p - F.one_hot(y, 5)) @ W.detach()).sign()  # the sign of grad NLL
    assert_same(weights, train.at(f, x, y), F.cross_entropy(z, y) + F.cross_entropy(f(x_adv), y))
    loss = train.vat(f, x, y, xi=1e-4)
    torch.set_rng_state(state)
    q = torch.randn_like(x) @ W.T
    r = 2 * F.normalize((q * p - p * (q * p).sum(1, keepdim=True)) @ W).detach()
    expected = F.cross_entropy(z, y) + (p * (p.log() - f(x + r).log_softmax(1))).sum(1).mean()
    assert_same(weights, loss, expected, rtol=1e-3, atol=1e-4)  # p(x) and r are constants
    W.data *= 30
    z, y = f(x), (f(x).argmax(1) + torch.arange(6) % 2) % 5  # some are beyond the margin
    expected = sum(max(0, 1 - z[i, y[i]] + max(z[i, k] for k in range(5) if k != y[i]))
                   + 0.1 * max((W[y[i]] - W[k]).square().sum() for k in range(5)) for i in range(6)) / 6
    assert_same(weights, train.margin(f, x, y), expected)
    f, state = smooth(), torch.get_rng_state()
    loss = train.pgd(f, x, y)
    torch.set_rng_state(state)
    r = 2 * F.normalize(torch.randn_like(x)) * torch.rand(6, 1, dtype=torch.float64) ** (1 / 64)
    for _ in range(10):
        x_i = (x + r).clamp(0, 1).requires_grad_()
        grad, = torch.autograd.grad(F.cross_entropy(f(x_i), y), x_i)
        r = (x_i.detach() + 0.5 * F.normalize(grad) - x).renorm(p=2, dim=0, maxnorm=2)
    assert_same(list(f.parameters()), loss, F.cross_entropy(f((x + r).clamp(0, 1)), y))
    check_gradient(lambda: train.margin(f, x, y), list(f.parameters()))


def test_adam_learning_rates_pretraining_and_the_settings_of_a_step(monkeypatch):
    """The pretraining is plain NLL, fills the confidence and leaves the critic alone."""
    flags = "--lam 1 --lambda-rec 2 --lambda-grad 3 --attack-steps 4 --target uniform".split()
    run, baseline, short = (train.start(train.parse_flags(flags)[1], "cpu") for flags in (
        flags, ["--defense", "reference"], ["--defense", "reference", "--epochs", "10"]))
    adams = [(adam.defaults["lr"], adam.defaults["betas"]) for adam in (run.adam_f, run.adam_D, baseline.adam_f)]
    assert adams == [(5e-4, (0.5, 0.999)), (1e-3, (0.5, 0.999)), (1e-3, (0.9, 0.999))]
    for one, epoch, factor in ((run, 40, 1), (run, 41, 0.5), (run, 80, 0.5), (run, 81, 0.25), (run, 100, 0.25),
                               (run, 0, 1), (baseline, 1, 1), (baseline, 3, 0.95 ** 2), (short, 3, 0.95 ** 20)):
        train.set_learning_rates(one, epoch)
        for adam in filter(None, (one.adam_f, one.adam_D)):
            assert adam.param_groups[0]["lr"] == pytest.approx(factor * adam.defaults["lr"])
    x, y, confidence, D = torch.rand(20, 1, 28, 28), torch.arange(20) % 10, RunningConfidence(10), copy.deepcopy(run.D)
    logits = run.f(x).detach()
    confidence.update(logits)
    parts = train.step(run, 0, x, y)
    assert list(parts) == ["nll"] and parts["nll"].item() == pytest.approx(F.cross_entropy(logits, y).item())
    assert F.cross_entropy(run.f(x), y) < parts["nll"]  # f moved, downhill
    assert torch.allclose(run.confidence.mean, confidence.mean) and confidence.mean.min() < 1
    torch.testing.assert_close(run.D.state_dict(), D.state_dict(), rtol=0, atol=0)
    monkeypatch.setattr(train, "train_step", mock.Mock())
    train.step(run, 1, x, y)
    arguments = train.train_step.call_args.args
    assert arguments[2] is run.confidence and arguments[7:] == (1, 2, 3, 4, uniform_class)


def test_defaults_are_those_of_the_paper():
    for function, defaults in {
            attack: (5, 0.05, False), critic_loss: (10.0,), classifier_loss: (0.01, 5), train.vat: (2.0, 1e-2),
            train_step: (0.01, 10.0, 5, closest_class), deepfool: (500, 0.1, 0.02), carlini_wagner: (1000, 9, 0.01),
            high_confidence_attack: (500, 0.1, 0.02), ddn: (100, 9)}.items():
        assert getattr(function, "__wrapped__", function).__defaults__ == defaults
    assert [train.parse_flags(["--quick"])[1][name] for name in ("epochs", "train_images")] == [2, 6000]


@pytest.mark.parametrize("max_step", [0.1, math.inf])
def test_deepfool_image_by_image(max_step):
    """On a network whose closest class changes on the way, and with pixels at the ends of the box."""
    f = nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 30))
    for weight in f.parameters():
        weight.data *= 3
    f, x = f.double(), torch.rand(12, 1, 8, 8).double().round()
    y, expected = f(x).argmax(1), []
    for image, label in zip(x.split(1), y.split(1)):
        r = torch.zeros_like(image)
        while f((image + 1.02 * r).clamp(0, 1)).argmax() == label:
            length, k = distances(f, image + r, label)[0].min(0)
            W = jacobians(f, image + r)[1][0]
            r = r + (min(length, max_step) + 1e-4) * F.normalize(W[k] - W[label]).view_as(r)
            r = ((image + 1.02 * r).clamp(0, 1) - image) / 1.02
        expected.append((image + 1.02 * r).clamp(0, 1))
    x_adv = deepfool(f, x, y, max_step=max_step)
    assert torch.allclose(x_adv, torch.cat(expected), rtol=0, atol=1e-9)
    assert (f(x_adv).argmax(1) != distances(f, x, y).argmin(1)).any()


def test_carlini_wagner_image_by_image():
    """Adam by hand, and of each image the shortest that any step of any search found."""
    f, x = smooth(), torch.rand(4, 1, 8, 8).double().round() * 0.8
    f[3].bias.data -= 50  # all logits are negative: a masked 0 must not count as a rival
    y, expected = f(x).argmax(1), []
    for image, label in zip(x, y):
        low, c, high, best, shortest = 0, 1e-3, math.inf, image, math.inf
        for _ in range(6):
            w, m, v, found = (0.999999 * (2 * image - 1)).atanh(), 0, 0, False
            for i in range(1, 41):
                w = w.detach().requires_grad_()
                x_i = (w.tanh() + 1) / 2
                z = f(x_i[None])[0]
                gap = z[label] - max(z[k] for k in range(5) if k != label)
                grad, = torch.autograd.grad((x_i - image).square().sum() + c * gap.clamp(min=0), w)
                found = found or gap < 0
                if gap < 0 and (x_i - image).norm() < shortest:
                    best, shortest = x_i.detach(), (x_i - image).norm()
                m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad ** 2
                w = w - 0.05 * (m / (1 - 0.9 ** i)) / ((v / (1 - 0.999 ** i)).sqrt() + 1e-8)
            low, high = (low, c) if found else (c, high)
            c = 10 * c if high == math.inf else (low + high) / 2
        expected.append(best)
    x_adv = carlini_wagner(f, x, y, steps=40, search_steps=6, lr=0.05)
    assert torch.allclose(x_adv, torch.stack(expected), rtol=0, atol=1e-6) and (f(x_adv).argmax(1) != y).any()


def test_ddn_finds_the_distance_to_the_boundaries_of_linear_classifiers():
    """At any scale of the logits. If the box cuts the way off, x_adv is clamp(x + t w), with t from the boundary."""
    for K, classes in ((3, 9), (20, 2)):
        f, x = nn.Linear(64, K).double(), 0.4 + 0.2 * torch.rand(20, 64).double()
        f.weight.data *= torch.logspace(-0.5, 0.5, K)[:, None]
        f.bias.data -= f(torch.full((64,), 0.5).double())
        y = f(x).argmax(1)
        distance = distances(f, x, y).amin(1)
        for scale in (1, 100, 0.01):
            length = measure(lambda x: scale * f(x), x, y, functools.partial(ddn, classes=classes))["length"]
            assert (length >= distance - 1e-9).all() and (length <= 1.01 * distance).all()
    f, x = nn.Linear(64, 2).double(), torch.rand(20, 64).double().round()
    y, low, high = f(x).argmax(1), torch.zeros(20, 1).double(), torch.full((20, 1), 1e3).double()
    w = torch.where(y == 0, 1, -1)[:, None] * (f.weight[1] - f.weight[0]).detach()
    for _ in range(60):
        t = (low + high) / 2
        beyond = (f((x + t * w).clamp(0, 1)).argmax(1) != y)[:, None]
        low, high = torch.where(beyond, low, t), torch.where(beyond, t, high)
    expected, length = ((x + high * w).clamp(0, 1) - x).norm(dim=1), measure(f, x, y, ddn)["length"]
    assert (expected > 1.2 * distances(f, x, y).amin(1)).any()  # the box matters
    assert (length >= expected - 1e-9).all() and (length <= 1.02 * expected).all()


def test_ddn_finds_the_closest_class_though_the_likelihood_leads_to_another():
    def f(x):  # class 1 is at the distance 0.1, class 2 at 0.15
        return torch.stack([0 * x[:, 0], x[:, 0] - 0.6, 15 * (x[:, 1] - 0.65)], 1)
    x, y = torch.full((1, 2), 0.5).double().requires_grad_(), torch.tensor([0])
    (to_1, to_2), = torch.autograd.grad(F.cross_entropy(f(x), y), x)[0]
    assert to_2 > 1.5 * to_1 and measure(f, x.detach(), y, ddn)["length"].item() == pytest.approx(0.1, rel=0.01)


def test_ddn_against_a_grid_over_two_pixels():
    f = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    for layer in f[::2]:
        layer.weight.data *= 3
    axis, x = torch.linspace(0, 1, 1001), torch.rand(40, 2)
    grid, y = torch.cartesian_prod(axis, axis), f(x).argmax(1)
    label = f(grid).argmax(1)
    smallest = torch.stack([(grid[label != k] - image).norm(dim=1).min() for image, k in zip(x, y)])
    far = smallest > 0.05  # otherwise the grid is too coarse for 1%
    assert far.sum() > 10 and (measure(f, x, y, ddn)["length"] <= 1.01 * smallest)[far].all()


def test_targets_and_the_high_confidence_attack_step_by_step(monkeypatch):
    """Each step is Eq. 7's, cut before the overshoot, then clamped. paper_attack goes to the closest class."""
    f, x = smooth(), torch.rand(20, 1, 8, 8).double()
    y, C = f(x).argmax(1), f(x).softmax(1).amax(1)
    distance, target, uniform = boundaries(f, x, y)[1], closest_class(f, x, y), uniform_class(f, x, y.expand(200, 20))
    assert torch.allclose(distance, distances(f, x, y)) and not distance.requires_grad
    assert torch.equal(target, distance.argmin(1)) and target.unique().numel() > 1
    for label, drawn in zip(y.tolist(), uniform.T.tolist()):
        assert {*drawn} == {*range(5)} - {label}
    for max_step in (0.1, math.inf):
        expected = x
        for _ in range(2):
            r_i, p, _ = attack_step(f, expected, target, 0.9999)
            length = r_i.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            expected = (expected + 1.02 * r_i / length * length.clamp(max=max_step)).clamp(0, 1)
        assert (p < 0.9999).all() and not r_i.requires_grad and not x.requires_grad  # each image takes both steps
        assert torch.allclose(high_confidence_attack(f, x, target, 0.9999, 2, max_step), expected, rtol=0, atol=1e-12)
    assert (f(high_confidence_attack(f, x, target, 0.21)).argmax(1) == target).all()  # though p = 0.21 comes earlier
    x_adv, expected = paper_attack(f, x, y), high_confidence_attack(f, x, target, C)
    there = f(expected).argmax(1) == target
    assert there.sum() > 10 and torch.equal(x_adv[there], expected[there]) and torch.equal(x_adv[~there], x[~there])
    assert (f(x_adv).softmax(1)[range(20), target] >= C)[there].double().mean() > 0.9
    third = x[(y != y[0]) & (y != target[0])][:1]  # of another class than image 0 and its target
    monkeypatch.setattr(evaluation, "high_confidence_attack", lambda *arguments: third)
    assert torch.equal(paper_attack(f, x[:1], y[:1]), x[:1])


@pytest.mark.parametrize("method", [
    deepfool, functools.partial(carlini_wagner, steps=20, search_steps=5, lr=0.05), functools.partial(ddn, steps=30),
    paper_attack, lambda f, x, y: attack(f, x, closest_class(f, x, y), 0.9),
    lambda f, x, y: high_confidence_attack(f, x, closest_class(f, x, y), 0.9, steps=50)])
def test_every_attack_takes_each_image_by_itself_and_changes_nothing(method):
    f = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.0), nn.Linear(36, 5))
    f, x = f.double(), torch.rand(3, 1, 8, 8).double()
    f[5].weight.data *= 10
    f[0].requires_grad_(False)
    y, x_before, before = f(x).argmax(1), x.clone(), copy.deepcopy(f.state_dict())
    one_by_one = torch.cat([method(f, x[i:i + 1], y[i:i + 1]) for i in range(3)])
    other = x.to(memory_format=torch.channels_last).requires_grad_()
    for x_adv in (method(f, x, y), method(f, other, y), torch.no_grad()(method)(f, x, y)):
        assert torch.allclose(x_adv, one_by_one, rtol=0, atol=1e-6) and not x_adv.requires_grad
    assert torch.equal(x, x_before) and not torch.equal(x, one_by_one)
    torch.testing.assert_close(f.state_dict(), before, rtol=0, atol=0)
    assert f.training and not x.requires_grad and other.grad is None
    assert [(w.grad, w.requires_grad) for w in f.parameters()] == [*[(None, False)] * 2, *[(None, True)] * 2]
    assert torch.equal(method(lambda x: 0 * x.flatten(1)[:, :5], x, 0 * y), x)  # without a gradient no image moves


# --- Measuring, the tables, the pictures; the data ----------------------------------------------------------------

def test_rho_and_what_fails():
    """An image that is wrong by itself counts 0, though it is moved. What does not fool f, or is no image, failed."""
    x = torch.tensor([[0.3, 0.4], [0.8, 0.6], [0.6, 0.0], [0.8, 0.6], [0.6, 0.2], [0.6, 0.2], [0.0, 0.0]])
    f, y, x_adv = nn.Identity(), torch.zeros(7, dtype=torch.int64), x.clone()  # two pixels, which are the two logits
    x_adv[:3] = x.flip(1)[:3]
    x_adv[3:6] = torch.tensor([[0.5, 1 + 1e-7], [0.5, 1.001], [math.nan, 0.5]])
    found = measure(f, x, y, lambda f, x_right, y: x_adv[1:])
    assert found["length"].tolist() == pytest.approx([0, 0.2 * 2 ** 0.5, 0.6 * 2 ** 0.5, 0.5, *[math.inf] * 3])
    assert found["failed"] == 3 and found["rho"] == pytest.approx((0.2 * 2 ** 0.5 + 2 ** 0.5 + 0.5) / 4)
    assert evaluation.error_rate(f, x, y) == pytest.approx(1 / 7)
    found = measure(lambda x: 0 * x, x, y, lambda f, x, y: x)
    assert torch.equal(found["x_adv"], x) and found["failed"] == 7 and math.isnan(found["rho"])


def test_measure_refuses():
    f, x, y = nn.Identity(), torch.tensor([[1.0, 0.5]]), torch.tensor([0])
    for other_f, other_x, other_y, says in (
            (f, x + 1e-6, y, r"x: .* to 1\.000001, expected images in \[0,1\]"), (f, x * math.nan, y, "x: .* from nan"),
            (f, x.to(torch.uint8), y, r"x: torch\.uint8"), (f, x[0], y, r"x: torch\.float32 \(2,\)"),
            (f, x, y[:, None], r"y: torch\.int64 \(1, 1\)"), (f, x, y.float(), r"y: torch\.float32"),
            (f, x, y + 2, "y: .* from 2 to 2"), (f, x, y - 1, "y: .* from -1"),
            (lambda x: x / 0, x, y, "f: its logits at x are not finite"), (lambda x: x[None], x, y, r"\(1, 1, 2\)"),
            (lambda x: x[:, :1], x, y, r"f: logits of shape \(1, 1\), expected \(1, K\) with K > 1"),
            (nn.Dropout(0.5), torch.rand(20, 99), y.repeat(20), "eval mode"),
            (nn.Sequential(nn.BatchNorm2d(1), nn.Flatten()), torch.rand(20, 1, 1, 2), y.repeat(20), "eval mode")):
        with pytest.raises(ValueError, match=says):
            measure(other_f, other_x, other_y, lambda f, x, y: x)
    with pytest.raises(ValueError, match=r"attack: it returned \(2,\)"):
        measure(f, x, y, lambda f, x, y: x[0])


def test_what_the_tables_say(monkeypatch, tmp_path):
    """The smallest length is of all attacks but the paper's. Table 2 is on the images that the paper's attack moved."""
    moved, x, inf = torch.tensor([[0.8, 0.6], [0.9, 0.5], [1.0, 0.0]]), torch.tensor([[0.6, 0.8]] * 5), math.inf
    lengths = {deepfool: [3, 1.1, 2, inf, 0], ddn: [4, 1, 2, inf, 0], paper_attack: [0.1, 0.1, 0.1, inf, 0]}
    monkeypatch.setattr(evaluation, "measure", lambda f, x, y, attack, title: dict(
        length=torch.tensor(lengths[attack]), x_adv=torch.cat([moved, x[3:]]), rho=0.5, failed=1, seconds=2.3))
    row = evaluation.evaluate(nn.Identity(), x, torch.ones(5).long(), ["deepfool", "ddn", "paper"],
                              moved.repeat(5, 1), torch.tensor([0, 0, 1]).repeat(5), "")
    assert row["length"].tolist() == [3, 1, 2, inf, 0] and row["failed"] == {"deepfool": 1, "ddn": 1, "paper": 1}
    columns = ["deepfool", "rho", "at 1.5 %", "looks like target %", "looks like original %"]
    assert [row[name] for name in columns] == pytest.approx([0.5, (3 + 1 + 2) / 4, 60, 200 / 3, 100 / 3])
    settings = dict(arch="lenet", defense="critic", seed=0, epochs=3, data="mnist")
    row |= {"settings": settings, "checkpoint": "net-0.pt", "data": "mnist", "images": "3 images", "test error %": 1.0}
    other = row | {"settings": settings | {"seed": 1}, "test error %": 2.0, "deepfool": math.nan, "failed": {"ddn": 7},
                   "length": torch.tensor([0.5, inf])}
    lines = "\n".join(evaluation.report([row, other], ["deepfool", "ddn"]))
    parts = "net, 3 epochs ", "1.50±0.71 (0.93)", "nan±nan (0.288)", "net-0.pt: ddn failed on 7 images"
    assert [part for part in parts if part not in lines] == []
    assert "(0.93)" not in "\n".join(evaluation.report([row | {"data": "drawn"}], ["deepfool", "ddn"]))
    evaluation.save_json(tmp_path / "a.json", [other])
    row, = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity
    assert row["deepfool"] is None and row["length"] == [0.5, None]
    x_train, y_train = torch.arange(8.0).view(8, 1, 1, 1), torch.tensor([1, 1, 0, 0, 2, 2, 2, 3])
    x = torch.tensor([0.4, 2.6, 5.1]).view(3, 1, 1, 1)  # 1 1 0 0 2: the nearer pair; 0 0 2 1 2, 2 2 2 3 0
    assert evaluation.vote(x, x_train, y_train).tolist() == [1, 0, 2]


def test_pictures(tmp_path):
    page = torch.cat([torch.randint(256, (5, 7)) / 255, torch.tensor([[1, 1.01, -0.01, 0, 0, 0, 0.5]])])
    evaluation.save_png(str(tmp_path / "page.png"), page)
    content = (tmp_path / "page.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", content[16:24]) == (7, 6)
    assert content.endswith(b"\0\0\0\0IEND\xaeB`\x82")  # a chunk: length, kind, content, checksum
    lines = zlib.decompress(content[content.index(b"IDAT") + 4:-16])
    values = [list(lines[i + 1:i + 8]) for i in range(0, 48, 8)]
    assert values == [*(255 * page[:5]).round().int().tolist(), [255, 255, 0, 0, 0, 0, 128]]
    length = torch.tensor([0.0, 0.5, 1.25, math.inf])
    rows = [{"settings": {"defense": name}, "length": length} for name in ("critic", "at")]
    evaluation.save_svg(tmp_path / "curve.svg", "MLP", rows)
    svg = xml.etree.ElementTree.parse(tmp_path / "curve.svg").getroot()
    curve = svg.find(".//{*}polyline[@stroke-width='6']").get("points").split()
    assert {"70,135.0", "142,135.0", "150,215.0", "470,295.0"} <= {*curve}  # 75, 75, 50, 25%
    labels = [float(text.get("y")) for text in svg.findall(".//{*}text[@x='478']")]
    assert len(labels) == 2 and abs(labels[0] - labels[1]) >= 22
    x, y = torch.zeros(10, 1, 28, 28).double(), torch.arange(10)
    x.flatten(1)[:, :10] = 0.2 + 0.6 * torch.eye(10)
    page, reached, alike = evaluation.figure_2(  # no attack reaches class 9
        lambda x: 8 * x.flatten(1)[:, :10] - 1000 * F.one_hot(torch.tensor(9)), x, y, x.repeat(5, 1, 1, 1), y.repeat(5))
    assert page.shape == (640, 640) and (reached, alike) == (81, 81)
    cells = page.view(10, 64, 10, 64).transpose(1, 2)
    for i in range(10):
        assert cells[i, i, :4].eq(1).all() and cells[i, i, 4:-4, 4:-4].max().item() == pytest.approx(0.8, abs=1e-6)
    assert cells[3, 5, :4].eq(0).all() and cells[3, 5].max() > 0.5
    assert cells[3, 9].max() <= 0.35 and cells[9, 3].max() > 0.5  # dimmed where it fails, and only there
    with pytest.raises(ValueError, match="an image of each class"):
        evaluation.figure_2(nn.Flatten(), x[1:], y[1:], x, y)


@pytest.fixture
def small(monkeypatch):
    """Four small files in place of MNIST's, with their true checksums: name -> content."""
    files, entries = {}, []
    for (name, _, _), shape in zip(data.FILES, ((6, 4, 4), (6,), (3, 4, 4), (3,))):
        values = torch.randint(10, (math.prod(shape),)).tolist()
        files[name] = struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape) + bytes(values)
        entries.append((name, shape, hashlib.sha256(files[name]).hexdigest()))
    monkeypatch.setattr(data, "FILES", entries)
    return files


@pytest.mark.parametrize("where, ending", [("", ""), ("", ".gz"), ("MNIST/raw", ""), ("MNIST/raw", ".gz")])
def test_files_are_found_and_parsed(small, tmp_path, where, ending):
    (tmp_path / where).mkdir(parents=True, exist_ok=True)
    for name, content in small.items():
        (tmp_path / where / (name + ending)).write_bytes(gzip.compress(content) if ending else content)
    x_train, y_train, x_test, y_test = data.load_mnist(tmp_path, mirrors=())
    for found, content in zip((x_train[:, 0] * 255, y_train, x_test[:, 0] * 255, y_test), small.values()):
        assert found.flatten().tolist() == pytest.approx(list(content[4 + 4 * found.dim():]))


@pytest.mark.parametrize("breaking, says", [
    (lambda c: c[:-5], "it has 107 bytes"), (lambda c: c[:-1] + bytes([c[-1] ^ 1]), "not the published SHA-256"),
    (lambda c: gzip.compress(c)[:-9], "archive is broken"), (lambda c: b"<html>log in", "<html>")])
def test_broken_files_are_refused_by_name(small, tmp_path, breaking, says):
    name, content = next(iter(small.items()))
    (tmp_path / name).write_bytes(breaking(content))
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name} is not MNIST's {name}: ") + f".*{says}"):
        data.load_mnist(tmp_path, mirrors=())


def test_download(small, tmp_path, capsys, monkeypatch):
    for folder, pages in (("good", small), ("html", dict.fromkeys(small, b"<html>log in</html>"))):
        (tmp_path / folder).mkdir()
        for name, content in pages.items():
            (tmp_path / folder / f"{name}.gz").write_bytes(content)
    *bad, good = (f"{tmp_path.as_uri()}/{folder}/" for folder in ("missing", "html", "good"))
    tensors = data.load_mnist(tmp_path / "new", mirrors=[*bad, good])
    assert sorted(os.listdir(tmp_path / "new")) == sorted(f"{name}.gz" for name in small)
    torch.testing.assert_close(tensors, data.load_mnist(tmp_path / "new", mirrors=()))
    monkeypatch.setattr(data.load_mnist, "__defaults__", (None, bad))
    assert train.main(["--data-dir", str(tmp_path / "none"), "--out", str(tmp_path / "run.pt")]) == 2
    error = capsys.readouterr().err
    assert [part for part in ("No such file", "<html>", "--data drawn", *bad) if part not in error] == []
    assert len(error.splitlines()) <= 10 and not (tmp_path / "none").exists()


def test_drawn_digits(monkeypatch):
    (x, y), again, (x_other, _) = (data.drawn_digits(300, seed) for seed in (3, 3, 4))
    assert x.shape == (300, 1, 28, 28) and x.dtype == torch.float32 and x.min() == 0 and x.max() == 1
    assert y.dtype == torch.int64 and y.unique().tolist() == list(range(10))
    assert torch.equal(x, again[0]) and torch.equal(y, again[1]) and not torch.equal(x, x_other)
    monkeypatch.setattr(data, "drawn_digits", lambda n, seed: (torch.tensor([seed]), torch.tensor([n])))
    assert [part.tolist() for part in data.load("drawn")] == [[*range(6)], [10000] * 6, [6], [10000]]


# --- The scripts, as a user runs them -----------------------------------------------------------------------------

SCRIPTS = {"train": train, "eval": evaluation}
TINY = "--arch mlp --epochs 1 --data drawn --train-images 100 --device cpu".split()
REFERENCE = [*TINY, "--defense", "reference"]
BRIEF = "--n 3 --attacks deepfool --device cpu".split()


@pytest.fixture
def scripts(monkeypatch, tmp_path):
    """For train.main and eval.main in this process: an empty folder, small networks, a hundred digits over and over."""
    def tiny():
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 20), nn.ReLU(), nn.Linear(20, 10))

    def few(*source):
        x, y = data.drawn_digits(100, seed=0)
        return x.repeat(103, 1, 1, 1), y.repeat(103), x.repeat(100, 1, 1, 1), y.repeat(100)
    monkeypatch.setattr(data, "load", few)
    monkeypatch.setitem(evaluation.NETWORKS, "mlp", tiny)
    monkeypatch.setattr(train, "critic", lambda: nn.Sequential(*tiny(), GaussianNoise(0.5)))
    monkeypatch.chdir(tmp_path)


def save_weights(path, f=None, **settings):
    """A checkpoint of weights alone, in float16."""
    settings = {"arch": "mlp", "defense": "reference", "seed": 0, "data": "drawn", "epochs": 1, **settings}
    f = f or evaluation.NETWORKS[settings["arch"]]().half().state_dict()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.save({"settings": settings, "f": f}, path)


@pytest.mark.filterwarnings("error")
def test_both_scripts_end_to_end(scripts, capsys):
    name = "mlp-reference-quick-drawn-0"
    for script, flags in (("train", ["--quick", "--resume", *REFERENCE]), ("eval", [f"{name}.pt"])):
        failed = subprocess.run([sys.executable, HERE / f"{script}.py", *flags], capture_output=True, text=True)
        assert failed.returncode == 2 and re.fullmatch(f"{script}.py: error: .*{name}.pt.*\n", failed.stderr)
    assert train.main(["--quick", *REFERENCE]) == 0 and sorted(os.listdir("runs")) == [f"{name}.csv", f"{name}.pt"]
    said = capsys.readouterr()
    command = said.out.splitlines()[-1].removeprefix("Done. On the test set: python eval.py ").split()
    assert said.err == "" and evaluation.main([*command, *BRIEF, "--json", "a.json"]) == 0
    (row,), said = json.loads(Path("a.json").read_text()), capsys.readouterr().out
    assert len(row["length"]) == 3 and f"{row['rho']:.3f}" in said and "3 drawn test images" in said


@pytest.mark.parametrize("fused, fused_later, tolerance", [(True, True, 0), (True, False, 0.01), (False, True, 0.01)])
def test_resume_equals_uninterrupted(scripts, monkeypatch, capsys, fused, fused_later, tolerance):
    """Bit for bit; and from a machine where torch cannot fuse Adam to one where it can, and back."""
    not_fused = mock.Mock(wraps=torch.optim.Adam, side_effect=[RuntimeError, mock.DEFAULT] * 9)
    adam, flags = {True: torch.optim.Adam, False: not_fused}, [*TINY, "--epochs", "2", "--train-images", "200", "--out"]
    assert train.main([*flags, "whole.pt"]) == 0
    monkeypatch.setattr(torch.optim, "Adam", adam[fused])
    with monkeypatch.context() as patch:
        effects = [KeyboardInterrupt, *[mock.DEFAULT] * 5, KeyboardInterrupt]  # in the middle of the first, last epoch
        patch.setattr(train, "step", mock.Mock(wraps=train.step, side_effect=effects))
        for more, says in (([], "no epoch is finished yet"), (["--resume"], "goes on after the last whole epoch")):
            assert train.main([*flags, "parts.pt", *more]) == 130 and says in capsys.readouterr().err
    monkeypatch.setattr(torch.optim, "Adam", adam[fused_later])
    for says in ("Resumed after epoch 1 of 2", "Resumed after epoch 2 of 2"):  # the second time nothing is left
        assert train.main([*flags, "parts.pt", "--resume"]) == 0 and says in capsys.readouterr().out
    whole, parts = (torch.load(name, weights_only=True) for name in ("whole.pt", "parts.pt"))
    fused, fused_here = (bool(run["adam_f"]["param_groups"][0]["fused"]) for run in (parts, whole))
    assert fused == (fused_later and fused_here)  # torch before 2.4 fuses nothing on a CPU
    for row in (*whole["log"], *parts["log"]):
        row["seconds"] = None
    for name in ("f", "D", "confidence", "log"):
        torch.testing.assert_close(parts[name], whole[name], rtol=tolerance, atol=0.1 * tolerance)


def test_eval_whatever_happens(scripts, monkeypatch, capsys):
    """A pattern is expanded; what is finished is saved and printed after Ctrl-C and on a full disk."""
    for seed in (0, 1):
        save_weights(f"runs/{seed}/deep/net-{seed}.pt", seed=seed)
    with monkeypatch.context() as patch:
        effects = [mock.DEFAULT, KeyboardInterrupt, mock.DEFAULT]
        patch.setattr(evaluation, "evaluate", mock.Mock(wraps=evaluation.evaluate, side_effect=effects))
        assert evaluation.main(["runs/**/*.pt", *BRIEF, "--json", "new/a.json"]) == 130
        assert "Table 1" in capsys.readouterr().out and len(json.loads(Path("new/a.json").read_text())) == 1
        patch.setattr(data, "replace", mock.Mock(side_effect=OSError("no space left")))
        assert evaluation.main(["runs/**/*.pt", *BRIEF, "--json", "full.json"]) == 2
        said = capsys.readouterr()
        assert "no space left" in said.err and "Table 1" in said.out
    assert evaluation.main(["runs/*/*/net-1.pt", *BRIEF, "--figures", "pictures"]) == 0
    assert sorted(os.listdir("pictures")) == ["accuracy-mlp.svg", "figure2-net-1.png", "figure4-net-1.png"]


def test_what_is_trained_on_and_what_is_evaluated(scripts, monkeypatch):
    """The first 10,000 images are held out, each other one is trained on once an epoch. All test images are classified,
    the first n of one permutation are attacked. All in float32, though something has switched TF32 on."""
    x, y = torch.rand(10400, 1, 1, 1).expand(-1, 1, 28, 28), torch.arange(10400)
    monkeypatch.setattr(data, "load", mock.Mock(return_value=(x, y, x[400:], y[400:])))
    monkeypatch.setattr(train, "step", mock.Mock(side_effect=lambda run, epoch, x, y: {
        "loss": torch.tensor(run.adam_f.param_groups[0]["lr"])}))
    monkeypatch.setattr(train, "measure", lambda f, x, y, attack: {"rho": 0.1 * (attack is deepfool), "failed": 0})
    monkeypatch.setattr(evaluation, "evaluate", mock.Mock(return_value={"deepfool": 0.1, "failed": {}}))
    for script in (train, evaluation):
        monkeypatch.setattr(script, "error_rate", mock.Mock(return_value=0.01))
    save_weights("net.pt", data="mnist")
    for main, flags in ((train.main, [*REFERENCE, "--epochs", "2", "--train-images", "300", "--out", "run.pt"]),
                        (evaluation.main, ["net.pt", *BRIEF])):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
        torch.set_float32_matmul_precision("high")
        assert main(flags) == 0
        assert not torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"
    batches = [call.args[2:] for call in train.step.call_args_list]
    assert all(torch.equal(x_some, x[y_some]) for x_some, y_some in batches)
    first, second = (torch.cat([y_some for _, y_some in batches[i:i + 3]]).tolist() for i in (0, 3))
    assert first != second and sorted(first) == sorted(second) == [*range(10000, 10300)]
    rows = [*csv.DictReader(Path("run.csv").read_text().splitlines())]
    assert [float(row["loss"]) for row in rows] == pytest.approx([1e-3, 1e-3 * 0.95 ** 50])
    assert [(row["epoch"], row["val_error"], row["deepfool"]) for row in rows] == [(i, "0.01", "0.1") for i in "12"]
    assert torch.equal(train.error_rate.call_args.args[2], y[:10000])
    assert torch.equal(evaluation.error_rate.call_args.args[2], y[400:]) and data.load.call_args.args == ("mnist", None)
    _, x_some, some, _, x_near, y_near, _ = evaluation.evaluate.call_args.args
    assert some.tolist() == [6444, 3290, 9799] and torch.equal(x_some, x[some])
    assert torch.equal(y_near, y[10000:]) and torch.equal(x_near, x[10000:])


def test_the_changing_line_of_a_terminal(scripts, monkeypatch, capsys):
    save_weights("net.pt")
    for main, flags, says in (
            (train.main, [*REFERENCE, "--train-images", "300", "--out"], r"epoch 1: step 2 of 3, .* minutes left"),
            (evaluation.main, ["net.pt", *BRIEF, "--n", "60", "--json"], r"net\.pt deepfool: image 0 of \d")):
        for terminal in (True, False):
            monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
            assert main([*flags, f"{main.__module__}-{terminal}.pt"]) == 0
            shown = capsys.readouterr().err
            assert bool(re.search(says, shown)) == bool(shown) == terminal


@pytest.mark.parametrize("loss, says", [
    (lambda run: torch.tensor(math.nan), "the loss is not finite in step 1 of epoch 2"),
    (lambda run: run.f[1].bias.data.fill_(math.inf).sign()[0], "a weight is not finite after epoch 2")])
def test_what_is_not_finite_ends_the_run(scripts, monkeypatch, capsys, loss, says):
    monkeypatch.setattr(train, "step", lambda run, epoch, x, y: {"loss": loss(run) if epoch > 1 else torch.ones(())})
    assert train.main([*REFERENCE, "--epochs", "2", "--out", "nan.pt"]) == 2 and says in capsys.readouterr().err
    assert evaluation.load_checkpoint("nan.pt")[1]["epochs"] == "1 of 2"


@pytest.mark.parametrize("command, says", [*((command, None) for command in (
    "train --arch vgg", "train --defense magic", "train --epochs 0", "train --epochs 1.5", "train --seed -1",
    "train --lam nan", "train --lambda-rec inf", "train --lambda-grad -1", "train --attack-steps 0",
    "train --target far", "train --data cifar", "train --device abacus", "train --train-images 99",
    "train --train-images 50001", "train --out runs/lam0.5", "train --defense reference --lam 0.1", "train --quic",
    "eval", "eval x.pt --n 0", "eval x.pt --n 10001", "eval x.pt --attacks magic", "eval a/x.pt b/x.pt --figures d")),
    ("train --out net.pt", "net.pt is there already"), ("train --out log.pt", "log.csv is there already"),
    ("train --out net.pt --resume", "net.pt holds weights alone"), ("train --out net.pt --resume --seed 1", "seed 0"),
    ("train --out net.pt --resume --arch mlp", "arch lenet"), ("train --out none.pt --resume", "none.pt is not there"),
    ("train --out trap.pt --resume", "trap.pt is no checkpoint"), ("eval trap.pt", "trap.pt is no checkpoint"),
    ("eval cut.pt", "cut.pt is no checkpoint"), ("eval log.csv", "log.csv is no checkpoint"),
    ("eval other.pt", "other.pt is no checkpoint"), ("eval none.pt", "none.pt"),
    ("eval net.pt --json log.csv", "log.csv is there already"), ("eval net.pt drawn.pt", "choose with --data")])
def test_what_is_refused_by_name_before_any_work(scripts, monkeypatch, capsys, command, says):
    """In the last line on the screen. No code in a checkpoint is run, such as this which makes a folder."""
    trap = type("Trap", (), {"__reduce__": lambda _: (os.mkdir, ("trapped",))})()
    for name, f, source in (("net.pt", None, "mnist"), ("drawn.pt", None, "drawn"), ("trap.pt", trap, "mnist"),
                            ("other.pt", nn.Linear(2, 2).state_dict(), "mnist")):
        save_weights(name, f, **{**train.parse_flags([])[1], "data": source})
    Path("cut.pt").write_bytes(Path("net.pt").read_bytes()[:-5000])
    Path("log.csv").write_text("text")
    monkeypatch.setattr(data, "load", lambda *source: pytest.fail("the work has begun"))
    (script, *flags), before = command.split(), os.listdir()
    try:
        status = SCRIPTS[script].main(flags)
    except SystemExit as wrong_flag:
        status = wrong_flag.code
    *usage, error = capsys.readouterr().err.splitlines()
    assert (says or ["CHECKPOINT", *(flag for flag in flags if flag.startswith("--"))][-1]) in error
    assert status == 2 and bool(usage) == (says is None) and os.listdir() == before


@pytest.mark.skipif(not os.environ.get("MNIST_DIR"), reason="MNIST_DIR is not set to the folder of MNIST's four files")
def test_mnist_is_mnist_and_the_shipped_networks_err_as_often_as_measured():
    x_train, y_train, x, y = data.load_mnist()
    assert x_train.shape == (60000, 1, 28, 28) and x.shape == (10000, 1, 28, 28) and y_train.dtype == torch.int64
    assert x_train.min() == 0 and x_train.max() == 1 and x_train.mean().item() == pytest.approx(0.1307, abs=1e-4)
    assert y_train[:9].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1] and y[:5].tolist() == [7, 2, 1, 0, 4]
    for row in (row for arch in ("lenet", "mlp") for row in json.loads((HERE / f"results/{arch}.json").read_text())):
        f, settings = evaluation.load_checkpoint(HERE / row["checkpoint"])
        assert settings == row["settings"]
        assert 100 * evaluation.error_rate(f, x, y) == pytest.approx(row["test error %"], abs=0.001), row["checkpoint"]


def test_the_examples_of_readme(scripts):
    f, names = lenet(), {}
    save_weights("results/lenet-critic.pt", f.state_dict(), arch="lenet")
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 2 and names["parts"]["success"] > 0
    torch.testing.assert_close(names["f"](names["x"]), f(names["x"]))


@pytest.mark.parametrize("name", ["README.md", "results/README.md"])
def test_every_command_parses(name):
    found = re.findall(r"^ +python (train|eval)\.py([^#;\n]*)", (HERE / name).read_text(encoding="utf-8"), re.MULTILINE)
    assert len(found) > 1
    for script, flags in found:
        SCRIPTS[script].parse_flags(flags.split())
