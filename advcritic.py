"""Improved Network Robustness with Adversary Critic (Matyasko and Chau, NIPS 2018): the method, and only the method.

    x       images (N,1,28,28), float in [0,1]        f   classifier, images -> logits (N,K)
    y       labels (N,) int64                         D   critic, images -> logits (N,K)
    x_adv   A_f(x; target), the attacked images       C   confidence that the attack must reach (N,)
    target  class that the attack aims at (N,)        y_adv   class that f gives to x_adv (N,)

Headings name the item of the paper and stand in its order: Section 4 from Figure 3 to the alternating minimisation
(train_step, where everything comes together), then the two networks of Section 5.

Signs: Eqs. 4 and 5 as printed read D_k as the probability that an image is adversarial, with an unbounded loss. Here
D_k = sigmoid(logit k) is the probability that x is natural data of class k, with the usual cross-entropy: the critic
maximises log D_y(x) + log(1 - D_y_adv(x_adv)), and the classifier minimises -log D_y_adv(x_adv). With the logit s
these are softplus(-s) = -log sigmoid(s) and softplus(s) = -log(1 - sigmoid(s)).
"""
import torch
import torch.nn.functional as F
from torch import nn


def per_image(value, x):
    """value (N,) as (N,1,...,1), to multiply images x (N,...) one by one."""
    return value.view(-1, *[1] * (x.dim() - 1))


def checked(logits, x, **labels):
    """logits, if their shape is (N,K) with K >= 2 and each of the labels is (N,) int64, for N images x. ValueError
    names what is not. Looks at shapes alone: nothing here waits for a GPU."""
    if not isinstance(logits, torch.Tensor):
        raise ValueError(f"logits: {type(logits).__name__}, expected a tensor ({len(x)}, K)")
    if logits.dim() != 2 or len(logits) != len(x) or logits.shape[1] < 2:
        raise ValueError(f"logits of shape {tuple(logits.shape)}, expected ({len(x)}, K) with K >= 2 classes")
    for name, label in labels.items():
        if label.shape != (len(x),) or label.dtype != torch.int64:
            raise ValueError(f"{name}: {label.dtype} of shape {tuple(label.shape)}, expected int64 of ({len(x)},)")
    return logits


# --- Figure 3: the multiclass adversary critic --------------------------------------------------------------------

class GaussianNoise(nn.Module):
    """Adds N(0, std^2) noise to any tensor in training mode; the identity in eval mode (Section 5)."""

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
    """D: images (N,1,28,28) -> logits (N,10); logit k scores "natural data of class k" (Figure 3, Section 5).

    784-1200-1200-10, leaky ReLU 0.2, noise on the input of each layer: std 0.1 on the image, 0.5 on each hidden
    activation. The label enters only by choosing the output.
    """
    return he_normal(nn.Sequential(
        nn.Flatten(),
        GaussianNoise(0.1), nn.Linear(784, 1200), nn.LeakyReLU(0.2),
        GaussianNoise(0.5), nn.Linear(1200, 1200), nn.LeakyReLU(0.2),
        GaussianNoise(0.5), nn.Linear(1200, 10)))


# --- Eq. 4: the critic's objective, with the gradient norm penalty ------------------------------------------------

def gradient_penalty(score, x):
    """mean_i (|grad_x score_i|_2 - 1)^2, a differentiable scalar (Section 4, after Gulrajani et al. 2017).

    score (N,) must have been computed from x, which requires grad; image i may influence score i only.
    """
    grad, = torch.autograd.grad(score.sum(), x, create_graph=True)
    norm = (grad.flatten(1).square().sum(1) + 1e-12).sqrt()  # 1e-12: the root has no derivative at 0
    return (norm - 1).square().mean()


def critic_loss(D, x, y, x_adv, y_adv, lambda_grad=10.0):
    """Eq. 4, minimised by D; a scalar. With D_k the critic's logit k:

    mean softplus(-D_y(x)) + mean softplus(D_y_adv(x_adv)) + lambda_grad (penalty(D_y, x) + penalty(D_y_adv, x_adv))

    x, x_adv (N,...) images, both detached here; y (N,) true labels; y_adv (N,) the class that f gives to x_adv, also
    where the attack failed. The penalty is taken at x and at x_adv, not between them, and on the very logits of the
    first two terms: it sees the same draw of the critic's noise.
    float32 or float64; ValueError for wrong shapes.
    """
    x, x_adv = x.detach().requires_grad_(), x_adv.detach().requires_grad_()
    real = checked(D(x), x, y=y).gather(1, y[:, None]).squeeze(1)
    fake = checked(D(x_adv), x_adv, y_adv=y_adv).gather(1, y_adv[:, None]).squeeze(1)
    penalty = gradient_penalty(real, x) + gradient_penalty(fake, x_adv)
    return F.softplus(-real).mean() + F.softplus(fake).mean() + lambda_grad * penalty


# --- Eq. 5 and Eq. 6: the classifier's objective, with the cycle-consistency term ---------------------------------

def classifier_loss(f, D, x, y, x_adv, lam, lambda_rec=0.01, steps=5):
    """Eq. 5 + Eq. 6, minimised by f. With D_k the critic's logit k:

    mean NLL(x, y) + lam mean softplus(-D_y_adv(x_adv)) + lambda_rec mean |x_rec - x|_2^2,
    x_rec = A_f(x_adv; the class that f gives to x), to the confidence that f has in it at x; x_adv a constant

    x (N,...) images, y (N,) labels, x_adv what attack(f, x, ..., create_graph=True) made of x with the same f; lam is
    0.5 for the MLP and 0.1 for LeNet; steps of the attack back. The second and third mean run over the images whose
    attack changed the prediction (the paper's y_s != y_t); both are 0 where there is none.

    Returns the scalar, and a dict of its detached parts: nll, fool, cycle (before their weights) and success, the
    share of the images whose attack changed the prediction. float32 or float64; ValueError for wrong shapes.
    """
    if x_adv.shape != x.shape:
        raise ValueError(f"x_adv of shape {tuple(x_adv.shape)}, expected that of x, {tuple(x.shape)}")
    logits = checked(f(x), x, y=y)
    nll = F.cross_entropy(logits, y)
    probability, predicted = logits.softmax(1).max(1)
    with torch.no_grad():
        y_adv = f(x_adv).argmax(1)
    moved = y_adv != predicted

    def mean_moved(value):  # a weighted mean: x[moved] would have to wait for a GPU, to learn how many there are
        return torch.where(moved, value, 0).sum() / moved.sum().clamp(min=1)

    # The gradient of `fool` runs through D (whose weights stay put, see minimise) and x_adv into the attack and f.
    score = checked(D(x_adv), x).gather(1, y_adv[:, None]).squeeze(1)  # D_y_adv(x_adv)
    fool = mean_moved(F.softplus(-score))
    # As in the released code, x_adv is a constant here: of the two attacks only the way back is differentiated. As
    # there, its confidence is no constant, so this term trains f at x as well: about a third of its gradient. Eq. 6
    # prints |.|_2; the released code, where lambda_rec = 0.01 comes from, squares it, and so do we.
    x_rec = attack(f, x_adv.detach(), predicted, probability, steps, create_graph=True)
    cycle = mean_moved((x_rec - x).flatten(1).square().sum(1))

    parts = dict(nll=nll, fool=fool, cycle=cycle, success=moved.to(nll.dtype).mean())
    return nll + lam * fool + lambda_rec * cycle, {name: part.detach() for name, part in parts.items()}


# --- Eq. 7: one step of the attack --------------------------------------------------------------------------------

def attack_step(f, x, target, confidence, create_graph=False):
    """Eq. 7 at the point x: the shortest r_i that brings the target's log-probability, linearised at x, to log C.

    r_i = (sqrt(eps) + |log C - l| / n) w / n,   l = log p,   w = grad_x l,   n = sqrt(eps + |w|^2),   eps = 1e-8

    Eq. 7 prints (log C - l) / |w|, the length without its bars; the direction is w / |w|. sqrt(eps) carries the step
    just past its goal. x (N,...) images in float32 or float64, a constant here; target (N,) int64; C = confidence in
    (0,1], a float or (N,); f any callable, images -> logits (N,K).
    Returns r_i (N,...), and at x the target's probability p (N,) and f's logits (N,K): detached, or with create_graph
    differentiable functions of f's weights, r_i also of confidence. ValueError for wrong shapes and types, and for a
    float that is no probability. Works under torch.no_grad() and torch.inference_mode() unless create_graph.
    """
    eps = 1e-8
    C = as_confidence(confidence, x)
    with torch.inference_mode(False), torch.enable_grad():
        # Clones made here can be kept for the gradient; tensors made in inference mode cannot.
        x, target = x.clone().detach().requires_grad_(), target.clone()
        logits = checked(f(x), x, target=target)
        l = logits.log_softmax(1).gather(1, target[:, None]).squeeze(1)
        # The gradient of the sum holds every image's own gradient. create_graph makes w differentiable too: the
        # paper's second-order derivative d2f / dx dw.
        w, = torch.autograd.grad(l.sum(), x, create_graph=create_graph)
    if not create_graph:
        C, l, logits = C.detach(), l.detach(), logits.detach()
    n = (eps + w.flatten(1).square().sum(1)).sqrt()
    length = eps ** 0.5 + (C.log() - l).abs() / n
    return per_image(length / n, w) * w, l.exp(), logits


def as_confidence(confidence, x):
    """A confidence, a float in (0,1] or a tensor () or (N,), as a tensor (N,) of x's type. ValueError if it is none, or
    x is not float32 or float64: half precision would round the eps of Eq. 7 to 0."""
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x: {x.dtype}, expected images in float32 or float64")
    if isinstance(confidence, (int, float)) and not 0 < confidence <= 1:
        raise ValueError(f"confidence {confidence}, expected a probability in (0,1]")
    C = torch.as_tensor(confidence, dtype=x.dtype, device=x.device)
    if C.shape not in ((), (len(x),)):
        raise ValueError(f"confidence of shape {tuple(C.shape)}, expected a float or ({len(x)},)")
    return C.expand(len(x))


# --- Algorithm 1: the attack A_f ----------------------------------------------------------------------------------

def below(p, C):
    """1[p < C] (N,), with the gradient of sigmoid(C - p): the sigmoid-adjusted straight-through estimator."""
    s = torch.sigmoid(C - p)
    return s + (s.round() - s).detach()


def attack(f, x, target, confidence, steps=5, overshoot=0.05, create_graph=False):
    """A_f(x; target), Algorithm 1: x_adv (N,...), to which f gives the target a probability of at least confidence.

    From r = 0, `steps` times:   r += r_i 1[p(x_0) < C] ... 1[p(x_i) < C],   r_i by Eq. 7 at x_i = x + (1 + overshoot) r
    x_adv = x + (1 + overshoot) r,   not clipped to [0,1]

    x (N,...) images, target (N,) int64, C = confidence in (0,1], a float or (N,); f any callable, images -> logits
    (N,K). An image that reached C stays where it is; an attack that fails keeps its last iterate. Detached unless
    create_graph, in which case x_adv carries a gradient to f's weights and to confidence, and `steps` passes of f stay
    in memory. ValueError as in attack_step. The form of the paper's tests is eval.high_confidence_attack.
    """
    x, C = x.detach(), as_confidence(confidence, x)
    if not create_graph:
        C = C.detach()
    r, go = torch.zeros_like(x), torch.ones_like(C)
    for _ in range(steps):
        # Where the gradient stops. x_adv = x + (1 + overshoot) sum_i go_i r_i, and f's weights enter each summand in
        # two ways: through p, l and w, computed with the weights, and through the point x_i at which they are
        # computed, which the steps before it have reached with the same weights. We keep the first and cut the
        # second: x_i is a constant (to attack_step every x is), so each step is a differentiable function of the
        # weights at a fixed point, and the gradient of x_adv is the sum of the gradients of go_i r_i, each at its x_i.
        # Keeping the second would multiply every step's gradient by the Jacobians of all later steps, which hold
        # Hessians of log p.
        x_i = (x + (1 + overshoot) * r).detach()
        r_i, p, _ = attack_step(f, x_i, target, C, create_graph)
        go = go * below(p, C)
        r = r + per_image(go, x) * r_i
    return x + (1 + overshoot) * r


# --- Section 4: the attack's target and its confidence ------------------------------------------------------------

def boundaries(f, x, label):
    """The boundaries between label and every class k, f linearised at x (DeepFool, Moosavi-Dezfooli et al. 2016):

    gap (N,K) f_label - f_k;   norm (N,K) |grad f_label - grad f_k|_2;   both 0 at k = label
    w (N,...) grad f_k - grad f_label, of the class k whose boundary is closest: the direction towards it

    x (N,...) images, label (N,) int64; f any callable, images -> logits (N,K). All detached. One gradient at a time,
    so that memory does not grow with K. ValueError for wrong shapes.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x, label = x.clone().detach().requires_grad_(), label.clone()
        logits = checked(f(x), x, label=label)
        difference = logits - logits.gather(1, label[:, None])  # f_k - f_label
        gap, norms = -difference.detach(), []
        w, shortest = torch.zeros_like(x), torch.full_like(gap[:, 0], torch.inf)  # of the closest so far
        for k in range(logits.shape[1]):
            w_k, = torch.autograd.grad(difference[:, k].sum(), x, retain_graph=True)
            norm_k = w_k.flatten(1).norm(dim=1)
            norms.append(norm_k)
            distance = boundary_distance(gap[:, k], norm_k).masked_fill(label == k, torch.inf)
            closer = distance < shortest
            w = torch.where(per_image(closer, x), w_k, w)
            shortest = torch.where(closer, distance, shortest)
    return gap, torch.stack(norms, 1), w


def boundary_distance(gap, norm):
    """|gap| / norm, the distance to each boundary of boundaries(); 0 at the label itself, which has none."""
    return gap.abs() / norm.clamp(min=1e-12)


def closest_class(f, x, label):
    """The class (N,) other than label with the closest decision boundary, DeepFool's criterion at x (Section 4):

    argmin_{k != label} |f_k(x) - f_label(x)| / |grad f_k(x) - grad f_label(x)|_2

    x (N,...) images, label (N,) int64: in training the class that f predicts. f any callable, images -> logits (N,K).
    """
    gap, norm, _ = boundaries(f, x, label)
    return boundary_distance(gap, norm).scatter(1, label[:, None], torch.inf).argmin(1)


def uniform_class(f, x, label):
    """The paper's alternative: a class (N,) other than label, sampled from the masked uniform distribution. Arguments
    as of closest_class; f only says how many classes there are."""
    with torch.no_grad():
        num_classes = checked(f(x), x, label=label).shape[1]
    return (label + torch.randint_like(label, 1, num_classes)) % num_classes


class RunningConfidence(nn.Module):
    """The running mean, per class, of the classifier's confidence on natural images (Section 4); C = mean[target].

    mean (K,) starts at 1 and is a constant for the gradient. It is a buffer, so that it is saved with state_dict()
    and follows .to(device).
    """

    def __init__(self, num_classes):
        super().__init__()
        self.register_buffer("mean", torch.ones(num_classes))

    @torch.no_grad()
    def update(self, logits):
        """mean[k] <- 0.5 mean[k] + 0.5 (mean probability of k over the images predicted as k), from natural images'
        logits (N,K). A class that no image is predicted as keeps its value; rows that are not finite are left out."""
        if logits.dim() != 2 or logits.shape[1] != len(self.mean):
            raise ValueError(f"logits of shape {tuple(logits.shape)}, expected (N, {len(self.mean)})")
        probability, predicted = logits.to(self.mean.dtype).softmax(1).max(1)
        classes = torch.arange(len(self.mean), device=logits.device)
        is_k = (predicted[:, None] == classes) & probability.isfinite()[:, None]  # (N,K)
        batch_mean = torch.where(is_k, probability[:, None], 0).sum(0) / is_k.sum(0).clamp(min=1)
        self.mean.copy_(torch.where(is_k.any(0), 0.5 * self.mean + 0.5 * batch_mean, self.mean))


# --- Section 4: alternating minimisation of Eq. 4 and Eq. 5 -------------------------------------------------------

def train_step(f, D, confidence, adam_f, adam_D, x, y, lam, lambda_rec=0.01, lambda_grad=10.0, steps=5,
               choose_target=closest_class):
    """One training step of the classifier f and the critic D on a batch, in place.

    x (N,...) images in [0,1], y (N,) int64 labels; confidence a RunningConfidence, updated with x; adam_f, adam_D
    optimisers of f and of D, whose parameters stay as they are where they require no gradient; lam, lambda_rec,
    lambda_grad the weights in Eqs. 5, 6 and 4; steps of the attack; choose_target(f, x, label) picks its target. f must
    treat each image by itself and give the same logits in each of its 5 + 2 steps calls: no batch norm or dropout in
    training mode. D has as many classes as f, and is called in its present mode: train(), for its noise.

    Returns a dict of detached scalars: nll, fool, cycle, success as classifier_loss has them, and critic, Eq. 4.
    Nothing is read back to the host. Errors as critic_loss, classifier_loss and attack have them.
    """
    with torch.no_grad():
        logits = checked(f(x), x, y=y)
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
    """One step of optimizer on those of its parameters that require a gradient. No other tensor gets one, so that each
    loss moves one player."""
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    optimizer.zero_grad()
    if trained:
        loss.backward(inputs=trained)
    optimizer.step()


# --- Section 5: the two classifiers -------------------------------------------------------------------------------

def mlp():
    """The fully connected network of Table 1a: images (N,1,28,28) -> logits (N,10); 784-1200-1200-1200-10, ReLU."""
    return he_normal(nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 1200), nn.ReLU(),
        nn.Linear(1200, 1200), nn.ReLU(),
        nn.Linear(1200, 1200), nn.ReLU(),
        nn.Linear(1200, 10)))


def lenet():
    """LeNet-5 of Table 1b: images (N,1,28,28) -> logits (N,10); two 5x5 convolutions with pooling, two dense."""
    # Pooling before ReLU: the same function and gradients as ReLU before pooling, on a quarter of the values.
    return he_normal(nn.Sequential(
        nn.Conv2d(1, 32, 5), nn.MaxPool2d(2), nn.ReLU(),   # (N,32,12,12)
        nn.Conv2d(32, 64, 5), nn.MaxPool2d(2), nn.ReLU(),  # (N,64,4,4)
        nn.Flatten(),
        nn.Linear(1024, 512), nn.ReLU(),
        nn.Linear(512, 10)))
