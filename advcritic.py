"""Improved Network Robustness with Adversary Critic (Matyasko and Chau, NIPS 2018): the method, and only the method.

    x       images (N,...), float32 or float64        f   classifier, any callable: images -> logits (N,K)
    y       labels (N,) int64                         D   critic, images -> logits (N,K)
    x_adv   A_f(x; target), the attacked images       C   confidence that the attack must reach (N,)
    target  class that the attack aims at (N,)        y_adv   class that f gives to x_adv (N,)

In every function they are these, and ValueError names the one whose shape or type is not. f must treat each image by
itself: batch norm and dropout in eval mode. Headings name the items of the paper, in its order: the networks, Section 4
from Eq. 4 to the alternating minimisation (train_step, where everything comes together); last, what is checked.

Signs: Eqs. 4 and 5 as printed read D_k as the probability that an image is adversarial, with an unbounded loss. Here
D_k = sigmoid(logit k) is the probability that x is natural data of class k, with the usual cross-entropy: the critic
maximises log D_y(x) + log(1 - D_y_adv(x_adv)), and the classifier minimises -log D_y_adv(x_adv). With the logit s
these are softplus(-s) = -log sigmoid(s) and softplus(s) = -log(1 - sigmoid(s)).
"""
import torch
import torch.nn.functional as F
from torch import nn


# --- Figure 3 and Section 5: the critic and the two classifiers, images (N,1,28,28) -> logits (N,10) --------------

class GaussianNoise(nn.Module):
    """Adds N(0, std^2) noise in training mode; the identity in eval mode."""

    def __init__(self, std):
        super().__init__()
        self.std = std

    def forward(self, x):
        if not self.training:
            return x
        return x + self.std * torch.randn_like(x)


def he_normal(net):
    """Initialises every Linear and Conv2d of net in place: weights N(0, 2 / fan-in), biases 0. Returns net."""
    for layer in net.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return net


def critic():
    """D: logit k scores "natural data of class k". The label enters only by choosing the output (Figure 3).

    The paper has the noise and the leaky units, but not how much: 0.1, 0.5 and 0.2 are chosen.
    """
    return he_normal(nn.Sequential(
        nn.Flatten(),
        GaussianNoise(0.1), nn.Linear(784, 1200), nn.LeakyReLU(0.2),
        GaussianNoise(0.5), nn.Linear(1200, 1200), nn.LeakyReLU(0.2),
        GaussianNoise(0.5), nn.Linear(1200, 10)))


def mlp():
    """The fully connected network of Table 1a."""
    return he_normal(nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 1200), nn.ReLU(),
        nn.Linear(1200, 1200), nn.ReLU(),
        nn.Linear(1200, 1200), nn.ReLU(),
        nn.Linear(1200, 10)))


def lenet():
    """LeNet-5 of Table 1b. Pooling before ReLU is the same function as after it, on a quarter of the values."""
    return he_normal(nn.Sequential(
        nn.Conv2d(1, 32, 5), nn.MaxPool2d(2), nn.ReLU(),   # (N,32,12,12)
        nn.Conv2d(32, 64, 5), nn.MaxPool2d(2), nn.ReLU(),  # (N,64,4,4)
        nn.Flatten(),
        nn.Linear(1024, 512), nn.ReLU(),
        nn.Linear(512, 10)))


# --- Eq. 4: the critic's objective, with the gradient norm penalty ------------------------------------------------

def gradient_penalty(score, x):
    """mean_i (|grad_x score_i|_2 - 1)^2 (Section 4, after Gulrajani et al. 2017); score (N,) was computed from x."""
    grad, = torch.autograd.grad(score.sum(), x, create_graph=True)
    norm = (grad.flatten(1).square().sum(1) + 1e-12).sqrt()  # 1e-12: the root has no derivative at 0
    return (norm - 1).square().mean()


def critic_loss(D, x, y, x_adv, y_adv, lambda_grad=10.0):
    """Eq. 4, minimised by D; x and x_adv are constants. With s_k the critic's logit k:

    mean softplus(-s_y(x)) + mean softplus(s_y_adv(x_adv)) + lambda_grad (penalty(s_y, x) + penalty(s_y_adv, x_adv))

    Over all images, also where the attack failed. The penalty is taken at x and at x_adv, not between them, and on the
    very logits of the first two terms: it sees the same draw of the critic's noise.
    """
    x, x_adv = leaf(x), leaf(x_adv, "x_adv")
    real = pick(checked(D, x, y=y), y)
    fake = pick(checked(D, x_adv, y_adv=y_adv), y_adv)
    penalty = gradient_penalty(real, x) + gradient_penalty(fake, x_adv)
    return F.softplus(-real).mean() + F.softplus(fake).mean() + lambda_grad * penalty


# --- Eq. 5 and Eq. 6: the classifier's objective, with the cycle-consistency term ---------------------------------

def classifier_loss(f, D, x, y, x_adv, lam, lambda_rec=0.01, steps=5):
    """Eq. 5 + Eq. 6, minimised by f. With s_k the critic's logit k:

    mean NLL(x, y) + lam mean softplus(-s_y_adv(x_adv)) + lambda_rec mean |x_rec - x|_2^2,
    x_rec = A_f(x_adv; the class that f gives to x), to the confidence that f has in it at x

    x_adv is what attack(f, x, ..., create_graph=True) made of x with the same f. The second and third mean run over
    the images whose attack changed the prediction (the paper's y_s != y_t), and are 0 where there is none. lam is 0.5
    for the MLP and 0.1 for LeNet. Returns the loss, and a dict of its detached parts: nll, fool, cycle (before their
    weights) and success, the share of the images whose attack changed the prediction.
    """
    logits = checked(f, x, y=y)
    expect(isinstance(x_adv, torch.Tensor) and x_adv.shape == x.shape, "x_adv", x_adv, f"x's shape {tuple(x.shape)}")
    probability, predicted = logits.softmax(1).max(1)
    with torch.no_grad():
        y_adv = f(x_adv).argmax(1)
    # As in the released code, x_adv is a constant here: of the two attacks only the way back is differentiated. As
    # there, its confidence is no constant, so this term trains f at x as well: about a third of its gradient. Eq. 6
    # prints |.|_2; the released code, where lambda_rec = 0.01 comes from, squares it, and so do we.
    x_rec = attack(f, x_adv.detach(), predicted, probability, steps, create_graph=True)

    moved = y_adv != predicted
    nll = F.cross_entropy(logits, y)
    # The gradient of `fool` runs through D and x_adv into the attack and f.
    fool = mean_where(moved, F.softplus(-pick(checked(D, x_adv), y_adv)))
    cycle = mean_where(moved, (x_rec - x).flatten(1).square().sum(1))
    parts = dict(nll=nll, fool=fool, cycle=cycle, success=moved.to(nll.dtype).mean())
    return nll + lam * fool + lambda_rec * cycle, {name: part.detach() for name, part in parts.items()}


def mean_where(mask, value):
    """Mean of value (N,) over the True of mask (N,), 0 where there is none. value[mask] would make a GPU wait."""
    return torch.where(mask, value, 0).sum() / mask.sum().clamp(min=1)


# --- Eq. 7 and Algorithm 1: one step of the attack, and the attack A_f --------------------------------------------

def attack_step(f, x, target, confidence, create_graph=False):
    """Eq. 7 at the point x: the shortest r_i that brings the target's log-probability, linearised at x, to log C.

    r_i = (sqrt(eps) + |log C - l| / n) w / n,   l = log p,   w = grad_x l,   n = sqrt(eps + |w|^2),   eps = 1e-8

    Eq. 7 prints (log C - l) / |w|, the length without its bars; the direction is w / |w|. sqrt(eps) carries the step
    just past its goal. C = confidence in (0,1], a float or (N,); x is a constant.
    Returns r_i (N,...), and at x the target's probability p (N,) and f's logits (N,K): detached, or with create_graph
    differentiable functions of f's weights, r_i also of confidence.
    """
    eps = 1e-8
    C = as_confidence(confidence, x)
    with torch.inference_mode(False), torch.enable_grad():
        x = leaf(x)
        logits = checked(f, x, target=target)
        l = pick(logits.log_softmax(1), target.clone())  # a clone can be kept for the gradient, also in inference mode
        # The gradient of the sum holds every image's own gradient. create_graph makes w differentiable too: the
        # paper's second-order derivative d2f / dx dw.
        w, = torch.autograd.grad(l.sum(), x, create_graph=create_graph)
    if not create_graph:
        C, l, logits = C.detach(), l.detach(), logits.detach()
    n = (eps + w.flatten(1).square().sum(1)).sqrt()
    length = eps ** 0.5 + (C.log() - l).abs() / n
    return per_image(length / n, w) * w, l.exp(), logits


def attack(f, x, target, confidence, steps=5, overshoot=0.05, create_graph=False):
    """A_f(x; target), Algorithm 1: x_adv, to which f gives the target a probability of at least confidence.

    From r = 0, `steps` times:   r += r_i 1[p(x_0) < C] ... 1[p(x_i) < C],   r_i by Eq. 7 at x_i = x + (1 + overshoot) r
    x_adv = x + (1 + overshoot) r,   not clipped to [0,1]

    C = confidence in (0,1], a float or (N,). An image that reached C stays where it is; an attack that fails keeps its
    last iterate. Detached unless create_graph, in which case x_adv carries a gradient to f's weights and to confidence,
    and `steps` passes of f stay in memory. The form of the paper's tests is eval.high_confidence_attack.
    """
    C, x = as_confidence(confidence, x), x.detach()
    if not create_graph:
        C = C.detach()
    r, go = torch.zeros_like(x), torch.ones_like(C)
    for _ in range(steps):
        # Where the gradient stops: x_i is a constant. f's weights reach x_adv through each r_i, computed with them at
        # x_i, but not through the point x_i itself, to which earlier steps came with the same weights: that path would
        # multiply each step's gradient by the Jacobians of all later steps, which hold Hessians of log p.
        x_i = (x + (1 + overshoot) * r).detach()
        r_i, p, _ = attack_step(f, x_i, target, C, create_graph)
        s = torch.sigmoid(C - p)
        go = go * (s + (s.round() - s).detach())  # 1[p < C], with the gradient of s: the straight-through estimator
        r = r + per_image(go, x) * r_i
    return x + (1 + overshoot) * r


# --- Section 4: the attack's target and its confidence ------------------------------------------------------------

def boundaries(f, x, label):
    """The boundaries between label and every class k, f linearised at x (DeepFool, Moosavi-Dezfooli et al. 2016):

    gap (N,K) f_label - f_k;   norm (N,K) |grad f_label - grad f_k|_2;   both 0 at k = label
    w (N,...) grad f_k - grad f_label, of the class k whose boundary is closest: the direction towards it. All detached.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = leaf(x)
        logits = checked(f, x, label=label)
        label = label.clone()  # a clone can be kept for the gradient, also in inference mode
        difference = logits - pick(logits, label)[:, None]  # f_k - f_label
        gap = -difference.detach()
        norm = torch.zeros_like(gap)
        for i in range(1, logits.shape[1]):  # one gradient at a time: memory does not grow with K
            k = (label + i) % logits.shape[1]  # of each image another class than label
            w, = torch.autograd.grad(pick(difference, k).sum(), x, retain_graph=True)
            norm.scatter_(1, k[:, None], w.flatten(1).norm(dim=1, keepdim=True))
        closest = boundary_distance(gap, norm, label).argmin(1)
        w, = torch.autograd.grad(pick(difference, closest).sum(), x)
    return gap, norm, w


def boundary_distance(gap, norm, label):
    """|gap| / norm (N,K), the distance to each boundary of boundaries(); inf at the label itself, which has none."""
    return (gap.abs() / norm.clamp(min=1e-12)).scatter(1, label[:, None], torch.inf)


def closest_class(f, x, label):
    """The class (N,) other than label with the closest decision boundary, DeepFool's criterion at x (Section 4):

    argmin_{k != label} |f_k(x) - f_label(x)| / |grad f_k(x) - grad f_label(x)|_2

    In training the label is the class that f predicts.
    """
    gap, norm, _ = boundaries(f, x, label)
    return boundary_distance(gap, norm, label).argmin(1)


def uniform_class(f, x, label):
    """The paper's alternative: a class (N,) other than label, uniformly at random; f says how many there are."""
    with torch.no_grad():
        num_classes = checked(f, x, label=label).shape[1]
    return (label + torch.randint_like(label, 1, num_classes)) % num_classes


class RunningConfidence(nn.Module):
    """The running mean, per class, of the classifier's confidence on natural images (Section 4); C = mean[target].
    mean (K,) starts at 1, is a constant for the gradient, and a buffer: state_dict() and .to(device) know it."""

    def __init__(self, num_classes):
        super().__init__()
        self.register_buffer("mean", torch.ones(num_classes))

    @torch.no_grad()
    def update(self, logits):
        """mean[k] <- 0.5 mean[k] + 0.5 (mean probability of k over the images predicted as k), from natural images'
        logits (N,K). A class that no image is predicted as keeps its value; rows that are not finite are left out."""
        ok = isinstance(logits, torch.Tensor) and logits.dim() == 2 and logits.shape[1] == len(self.mean)
        expect(ok, "logits", logits, f"a tensor (N, {len(self.mean)})")
        probability, predicted = logits.to(self.mean.dtype).softmax(1).max(1)
        classes = torch.arange(len(self.mean), device=logits.device)
        is_k = (predicted[:, None] == classes) & probability.isfinite()[:, None]  # (N,K)
        batch_mean = torch.where(is_k, probability[:, None], 0).sum(0) / is_k.sum(0).clamp(min=1)
        self.mean.copy_(torch.where(is_k.any(0), 0.5 * self.mean + 0.5 * batch_mean, self.mean))


# --- Section 4: alternating minimisation of Eq. 4 and Eq. 5 -------------------------------------------------------

def train_step(f, D, confidence, adam_f, adam_D, x, y, lam, lambda_rec=0.01, lambda_grad=10.0, steps=5,
               choose_target=closest_class):
    """One training step of the classifier f and the critic D on a batch x in [0,1], y; in place.

    confidence is a RunningConfidence, updated with x; adam_f and adam_D the optimisers of f and of D; lam, lambda_rec,
    lambda_grad the weights in Eqs. 5, 6 and 4; steps those of the attack; choose_target(f, x, label) picks its target.
    D has as many classes as f, and is called in its present mode: train(), for its noise.
    Returns a dict of detached scalars: nll, fool, cycle, success as classifier_loss has them, and critic, Eq. 4.
    Nothing is read back to the host.
    """
    with torch.no_grad():
        logits = checked(f, x, y=y)
    players = [{p for group in adam.param_groups for p in group["params"]} for adam in (adam_f, adam_D)]
    if players[0] & players[1]:
        raise ValueError("adam_f and adam_D share weights, expected those of f and those of D")
    confidence.update(logits)
    target = choose_target(f, x, logits.argmax(1))
    # The attack is computed once. The critic sees its images, the classifier also differentiates through it.
    x_adv = attack(f, x, target, confidence.mean[target], steps, create_graph=True)
    with torch.no_grad():
        y_adv = f(x_adv).argmax(1)

    # Critic, Eq. 4: maximise log D_y(x) + log(1 - D_y_adv(x_adv)), with the gradient norm penalty.
    loss_D = critic_loss(D, x, y, x_adv, y_adv, lambda_grad)
    minimise(loss_D, adam_D)

    # Classifier, Eq. 5 + Eq. 6: minimise NLL - lam log D_y_adv(x_adv) + lambda_rec |A_f(x_adv) - x|^2.
    loss_f, parts = classifier_loss(f, D, x, y, x_adv, lam, lambda_rec, steps)
    minimise(loss_f, adam_f)
    return {**parts, "critic": loss_D.detach()}


def minimise(loss, optimizer):
    """One step of optimizer on those of its weights that require a gradient. No other tensor gets one, so that each
    loss moves one player. ValueError where the loss depends on none of them."""
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if not trained:
        return
    optimizer.zero_grad()
    loss.backward(inputs=trained)
    if all(p.grad is None for p in trained):
        raise ValueError("the loss reaches none of the optimizer's weights: is it of a copy, or of the other player?")
    optimizer.step()


# --- Shapes: none of these looks at values, so that nothing waits for a GPU ---------------------------------------

def per_image(value, x):
    """value (N,) as (N,1,...,1), to multiply images x (N,...) one by one."""
    return value.view(-1, *[1] * (x.dim() - 1))


def pick(logits, k):
    """Of logits (N,K) those of the classes k (N,): (N,)."""
    return logits.gather(1, k[:, None]).squeeze(1)


def expect(ok, name, value, expected):
    """ValueError unless ok, with the type and shape of what was given under this name."""
    if not ok:
        found = type(value).__name__
        if isinstance(value, torch.Tensor):
            found = f"{value.dtype} of shape {tuple(value.shape)}"
        raise ValueError(f"{name}: {found}, expected {expected}")


def expect_images(x, name="x"):
    """ValueError unless x is a tensor (N,...) of floating-point numbers."""
    ok = isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim() > 1
    expect(ok, name, x, "images, a tensor (N,...) of floating-point numbers")


def leaf(x, name="x"):
    """A constant copy of the images x, to take gradients with respect to it."""
    expect_images(x, name)
    return x.clone().detach().requires_grad_()


def checked(f, x, **labels):
    """f(x), if it is logits (N,K) with K >= 2 for images x, and each of the labels (N,) int64."""
    expect_images(x)
    for name, label in labels.items():
        ok = isinstance(label, torch.Tensor) and label.shape == (len(x),) and label.dtype == torch.int64
        expect(ok, name, label, f"a tensor ({len(x)},) of int64")
    logits = f(x)
    ok = isinstance(logits, torch.Tensor) and logits.dim() == 2 and len(logits) == len(x) and logits.shape[1] > 1
    expect(ok, "logits", logits, f"a tensor ({len(x)}, K) with K >= 2 classes")
    return logits


def as_confidence(confidence, x):
    """A confidence, a float in (0,1] or a tensor () or (N,), as a tensor (N,) of x's type, which is float32 or float64:
    half precision would round the eps of Eq. 7 to 0."""
    expect_images(x)
    expect(x.dtype in (torch.float32, torch.float64), "x", x, "images in float32 or float64")
    expect(isinstance(confidence, (int, float, torch.Tensor)), "confidence", confidence, "a float or a tensor")
    if isinstance(confidence, (int, float)) and not 0 < confidence <= 1:
        raise ValueError(f"confidence: {confidence}, expected a probability in (0,1]")
    C = torch.as_tensor(confidence, dtype=x.dtype, device=x.device)
    expect(C.shape in ((), (len(x),)), "confidence", C, f"a float or a tensor ({len(x)},)")
    return C.expand(len(x))
