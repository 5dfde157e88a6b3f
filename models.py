"""Small networks and the blocks that they are made of.

Every piece can be pasted elsewhere: it needs the imports below and the names in the "Needs" line of
its docstring. Layers take and return float tensors. Networks return logits; QuadModal returns an
embedding.

Letters in shapes: B batch, C channels, F features, H W rows and columns, T tokens or time steps.

    >>> net = EyeNet((32, 64), block="baseline", channels=32, blocks=4)
    >>> net(torch.zeros(2, 3, 32, 64)).shape
    torch.Size([2])
    >>> count_parameters(net)
    11457
    >>> net = PPGRegressor(PPGEncoder(channels=3, patch=4, width=64, depth=2))
    >>> net(torch.zeros(2, 3, 64)).shape
    torch.Size([2])
    >>> net = QuadModal({"motion": (128, 3), "spectrogram": (1, 64, 50)})
    >>> net({"motion": torch.zeros(2, 128, 3), "spectrogram": torch.zeros(2, 1, 64, 50)}).shape
    torch.Size([2, 64])
"""

import math
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F


# --------------------------------------------------------------------------------------------------
# Shared


def count_parameters(model, *, trainable_only=False):
    """Number of scalar parameters.

    Tied weights count once. Buffers (running statistics) do not count.

    Check: count_parameters(nn.Linear(3, 2)) == 8
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


def init_kaiming_xavier(module):
    """For `model.apply`: initialise convolutions and linear layers.

    Convolution weights are Kaiming-normal (fan_out, ReLU). Linear weights are Xavier-uniform with
    bias 0. Norms and convolution biases keep torch's initial values.

    Source: He et al. 2015, arXiv:1502.01852; Glorot and Bengio 2010
    Needs:  nn
    Check:  the weights of nn.Conv2d(3, 64, 3) have standard deviation sqrt(2 / (64 * 9)) = 0.059
    """
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def conv_bn(inputs, outputs, kernel, *, stride=1, dilation=1, groups=1, act=nn.Identity):
    """Convolution (odd kernel, padded, no bias since the norm has one), batch norm, activation.

    Shape: (B, inputs, H, W) -> (B, outputs, ceil(H / stride), ceil(W / stride))
    Needs:  nn
    Check: conv_bn(3, 32, 3) has 928 parameters
    """
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), act())


class ChannelLayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the channels of every pixel.

    Shape: (B, C, H, W) -> the same, in channels_last layout
    Needs:  nn
    Check: ChannelLayerNorm(32) has 64 parameters
    """

    def __init__(self, channels, *, eps=1e-6):
        super().__init__(channels, eps=eps)

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class StochasticDepth(nn.Module):
    """Drops a whole residual branch, sample by sample: `x + drop(branch(x))`.

        training:    y = x * keep / (1 - rate), keep ~ Bernoulli(1 - rate) per sample
        evaluation:  y = x

    Dividing by 1 - rate keeps the mean. Never put it on a path without a shortcut: that sample's
    signal would be zero.

    Shape:  (B, ...) -> the same
    Errors: ValueError unless 0 <= rate < 1
    Source: Huang et al. 2016, arXiv:1603.09382 (there evaluation multiplies by 1 - rate instead)
    Needs:  F, nn
    Check:  with rate 0.25 a sample is multiplied by 0 or by 4/3
    """

    def __init__(self, rate):
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"stochastic depth rate must be in [0, 1), got {rate}: "
                             "0 switches it off")
        self.rate = rate

    def forward(self, x):
        if not self.training or self.rate == 0:
            return x
        ones = x.new_ones([x.shape[0]] + [1] * (x.ndim - 1))
        return x * F.dropout(ones, self.rate)


class SqueezeExcite(nn.Module):
    """Scales every channel by a gate in (0, 1) that is computed from the means of all channels.

        y = x * sigmoid(W2 relu(W1 mean_hw(x) + b1) + b2)
        W1 maps C to max(1, C // reduction), W2 maps back; bias=False leaves b1 and b2 out

    Shape:  (B, C, H, W) -> the same
    Source: Hu et al. 2018, arXiv:1709.01507
    Needs:  nn
    Check:  SqueezeExcite(128) has 4,240 parameters
    """

    def __init__(self, channels, *, reduction=8, bias=True):
        super().__init__()
        hidden = max(1, channels // reduction)
        self.gate = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=bias), nn.ReLU(),
            nn.Conv2d(hidden, channels, 1, bias=bias), nn.Sigmoid())

    def forward(self, x):
        return x * self.gate(x.mean((2, 3), keepdim=True))


# --------------------------------------------------------------------------------------------------
# Pretrained backbones


def load_backbone(backbone, state, *, prefix="encoder."):
    """Fills a backbone from the state of the network it was pretrained in: all tensors or none.

    Only names under `prefix` are copied. The other names in the state (the pretraining head) are
    returned in "left_out", so that nothing is dropped silently.

    backbone  the module to fill
    state     {name: tensor} of the pretrained network, as state_dict() returns it
    returns   {"tensors", "scalars", "missing", "unexpected": counts, "left_out": names}

    Errors: ValueError, and nothing is changed, if a tensor of the backbone is missing, one under
            the prefix is unexpected, or a shape differs (another width, patch or depth). The
            message gives counts and names.
    Check:  a backbone saved as `model.encoder` and loaded into another is bit-equal to it
    """
    own = backbone.state_dict()
    loaded = {name[len(prefix):]: tensor for name, tensor in state.items()
              if name.startswith(prefix)}
    left_out = [name for name in state if not name.startswith(prefix)]
    missing = sorted(own.keys() - loaded.keys())
    unexpected = sorted(loaded.keys() - own.keys())
    common = [name for name in own if name in loaded]
    reshaped = [f"{name} is {tuple(loaded[name].shape)} there and {tuple(own[name].shape)} here"
                for name in common if loaded[name].shape != own[name].shape]
    if missing or unexpected or reshaped or not own:
        problems = []
        for title, names in (("missing", missing), ("unexpected", unexpected),
                             ("of another shape", reshaped)):
            if names:
                more = ", ..." if len(names) > 3 else ""
                problems.append(f"{title} {len(names)} ({', '.join(names[:3])}{more})")
        problem = "; ".join(problems) or "there is nothing to load"
        raise ValueError(f"{len(common) - len(reshaped)} of {len(own)} tensors fit "
                         f"under {prefix!r}: {problem}")
    result = backbone.load_state_dict(loaded)
    return {"tensors": len(loaded), "scalars": sum(tensor.numel() for tensor in loaded.values()),
            "missing": len(result.missing_keys), "unexpected": len(result.unexpected_keys),
            "left_out": left_out}


def freeze_backbone(backbone, *, unfreeze_last=0):
    """Switches off the gradients of a backbone, except for its last layers and the norm after them.

    The backbone has `layers`, a sequence, and `norm`, which follows them. Train with
    train_mode(model), which keeps frozen modules in eval mode: dropout in a frozen backbone is
    noise that no weight can learn from.

    Errors: ValueError unless 0 <= unfreeze_last <= len(backbone.layers)
    """
    layers = len(backbone.layers)
    if not 0 <= unfreeze_last <= layers:
        raise ValueError(f"unfreeze_last {unfreeze_last} must be between 0 and {layers}, "
                         "the number of layers")
    backbone.requires_grad_(False)
    if unfreeze_last:
        backbone.layers[layers - unfreeze_last :].requires_grad_(True)
        backbone.norm.requires_grad_(True)


def train_mode(model):
    """Sets training mode, but keeps every module whose parameters are all frozen in eval mode.

    So dropout in a frozen backbone is off and its running statistics do not change; `model.train()`
    would undo both. A dropout between two frozen modules is on, unless a frozen module contains it.
    """
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()


# --------------------------------------------------------------------------------------------------
# EyeNet: one logit for a tiny image


class StandardisedImage(nn.Module):
    """Each image brought to mean 0 and sd 1 over its pixels and colours.

        y = (x - mean) / (sd + 0.02)

    What brightness and contrast were is lost. An image of one colour becomes 0.

    Shape:  (B, C, H, W), about 1 wide -> the same
    Needs:  nn, torch
    """

    def forward(self, x):
        sd, mean = torch.std_mean(x, dim=(1, 2, 3), correction=0, keepdim=True)
        return (x - mean) / (sd + 0.02)


class LocalGradients(nn.Module):
    """The gradient in eight directions, over the energy of the gradients around the pixel.

        gx, gy = central differences of grey, the mean of the channels, mirrored at the edge
        o_k    = relu(gx cos(k pi / 4) + gy sin(k pi / 4)),  k = 0 ... 7
        e      = sqrt(mean of sum_k o_k^2 over the 17x17 pixels around)
        y_k    = o_k / (e + 0.05 mean(e) + 0.01)

    It is what histograms of oriented gradients count, one value a pixel. Brightness drops out, and
    contrast does so region by region.

    Shape:  (B, C, H, W), about 1 wide, H and W at least 2 -> (B, 8, H, W)
    Source: Dalal and Triggs 2005, whose blocks are divided by their energy in the same way
    Check:  2 x + 1 gives nearly what x does
    Needs:  F, math, nn, torch
    """

    def forward(self, x):
        grey = F.pad(x.mean(1, keepdim=True), (1, 1, 1, 1), mode="reflect")
        gx = (grey[:, :, 1:-1, 2:] - grey[:, :, 1:-1, :-2]) / 2
        gy = (grey[:, :, 2:, 1:-1] - grey[:, :, :-2, 1:-1]) / 2
        angle = torch.arange(8, device=x.device)[:, None, None] * (math.pi / 4)
        oriented = F.relu(gx * angle.cos() + gy * angle.sin())
        energy = oriented.square().sum(1, keepdim=True)
        energy = F.avg_pool2d(energy, 17, stride=1, padding=8, count_include_pad=False).sqrt()
        return oriented / (energy + 0.05 * energy.mean((2, 3), keepdim=True) + 0.01)


class PlainBlock(nn.Sequential):
    """A 3x3 convolution, BN and ReLU; with stride 2 after the maximum of 2x2 pixels.

    Shape:  (B, inputs, H, W) -> (B, outputs, floor(H / stride), floor(W / stride))
    Source: Simonyan and Zisserman 2015 (VGG), arXiv:1409.1556; BN is an addition
    Check:  PlainBlock(16, 32) has 4,672 parameters
    Needs:  conv_bn, nn
    """

    def __init__(self, inputs, outputs, *, stride=1):
        super().__init__()
        if stride == 2:
            self.append(nn.MaxPool2d(2))
        self.append(conv_bn(inputs, outputs, 3, act=nn.ReLU))


class DepthwiseBlock(nn.Module):
    """Depthwise separable convolution: 3x3 in every channel, then 1x1 across channels.

        y = relu(x + branch(x))
        branch: depthwise 3x3 (stride), BN, ReLU, 1x1, BN

    The shortcut (and with it stochastic depth) exists only if input and output have the same shape.

    Shape:  (B, inputs, H, W) -> (B, outputs, ceil(H / stride), ceil(W / stride))
    Source: Howard et al. 2017 (MobileNet), arXiv:1704.04861; the shortcut is an addition
    Check:  DepthwiseBlock(32, 32) has 1,440 parameters
    Needs:  conv_bn, StochasticDepth, F, nn
    """

    def __init__(self, inputs, outputs, *, stride=1, drop_rate=0.0):
        super().__init__()
        self.branch = nn.Sequential(
            conv_bn(inputs, inputs, 3, stride=stride, groups=inputs, act=nn.ReLU),
            conv_bn(inputs, outputs, 1))
        self.shortcut = stride == 1 and inputs == outputs
        self.drop = StochasticDepth(drop_rate)

    def forward(self, x):
        y = self.branch(x)
        return F.relu(x + self.drop(y) if self.shortcut else y)


class InvertedSEBlock(nn.Module):
    """Inverted residual with squeeze-and-excite: widen by 4, depthwise 3x3, gate, narrow.

        y = silu(x + branch(x))
        branch: 1x1 to 4C, BN, SiLU, depthwise 3x3 (stride), BN, SiLU, squeeze-excite, 1x1, BN

    The shortcut (and with it stochastic depth) exists only if input and output have the same shape.

    Shape:  (B, inputs, H, W) -> (B, outputs, ceil(H / stride), ceil(W / stride))
    Source: Sandler et al. 2018 (MobileNetV2), arXiv:1801.04381, which has ReLU6 inside and nothing
            after the sum
    Check:  InvertedSEBlock(32, 32) has 14,160 parameters
    Needs:  conv_bn, StochasticDepth, SqueezeExcite, F, nn
    """

    def __init__(self, inputs, outputs, *, stride=1, drop_rate=0.0):
        super().__init__()
        hidden = 4 * inputs
        self.branch = nn.Sequential(
            conv_bn(inputs, hidden, 1, act=nn.SiLU),
            conv_bn(hidden, hidden, 3, stride=stride, groups=hidden, act=nn.SiLU),
            SqueezeExcite(hidden),
            conv_bn(hidden, outputs, 1))
        self.shortcut = stride == 1 and inputs == outputs
        self.drop = StochasticDepth(drop_rate)

    def forward(self, x):
        y = self.branch(x)
        return F.silu(x + self.drop(y) if self.shortcut else y)


class ConvNeXtBlock(nn.Module):
    """ConvNeXt block: depthwise 7x7, then an MLP on the channels of every pixel, scaled.

        x = downsample(x)       only if the shape changes
        y = x + scale * mlp(layernorm(depthwise7x7(x)))
        downsample: channel LayerNorm, convolution with kernel = stride
        mlp: C to 4C, GELU, back to C

    The scale is learned and starts at 1e-6, so the block starts as the identity and its MLP gets
    gradients of that size: it needs an optimizer that normalises them (Adam). An odd side loses
    its last row or column when it is halved.

    Shape:  (B, inputs, H, W) -> (B, outputs, H // stride, W // stride)
    Source: Liu et al. 2022, arXiv:2201.03545
    Check:  ConvNeXtBlock(32, 32) has 10,048 parameters, ConvNeXtBlock(32, 64, stride=2) has 44,800
    Needs:  ChannelLayerNorm, StochasticDepth, F, nn, torch
    """

    def __init__(self, inputs, outputs, *, stride=1, drop_rate=0.0):
        super().__init__()
        self.downsample = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                ChannelLayerNorm(inputs),
                nn.Conv2d(inputs, outputs, kernel_size=stride, stride=stride))
        self.depthwise = nn.Conv2d(outputs, outputs, 7, padding=3, groups=outputs)
        self.norm = nn.LayerNorm(outputs, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(outputs, 4 * outputs), nn.GELU(), nn.Linear(4 * outputs, outputs))
        self.scale = nn.Parameter(torch.full((outputs,), 1e-6))
        self.drop = StochasticDepth(drop_rate)

    def forward(self, x):
        x = self.downsample(x)
        y_bhwc = self.depthwise(x).permute(0, 2, 3, 1)
        y_bhwc = self.scale * self.mlp(self.norm(y_bhwc))
        return x + self.drop(y_bhwc.permute(0, 3, 1, 2))


class MixerLayer(nn.Module):
    """MLP-Mixer layer: an MLP across the tokens of every channel, then one across the channels.

        x = x + mlp_T(layernorm(x)^T)^T
        y = x + mlp_C(layernorm(x))
        mlp_n: n to 2n, GELU, back to n

    Dropout follows both linear layers of an MLP. The number of tokens is fixed: it is a width of
    the first MLP.

    Shape:  (B, T, C) -> the same
    Source: Tolstikhin et al. 2021, arXiv:2105.01601
    Needs:  nn
    Check:  MixerLayer(6, 64) has 16,994 parameters
    """

    def __init__(self, tokens, channels, *, dropout=0.0):
        super().__init__()

        def mlp(width):
            return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(dropout),
                                 nn.Linear(2 * width, width), nn.Dropout(dropout))

        self.token_norm, self.token_mlp = nn.LayerNorm(channels), mlp(tokens)
        self.channel_norm, self.channel_mlp = nn.LayerNorm(channels), mlp(channels)

    def forward(self, x_btc):
        x_bct = self.token_norm(x_btc).transpose(1, 2)
        x_btc = x_btc + self.token_mlp(x_bct).transpose(1, 2)
        return x_btc + self.channel_mlp(self.channel_norm(x_btc))


class TransformerLayer(nn.Module):
    """Transformer layer, norm first: attention among the tokens, then an MLP on every token.

        x = x + attention(layernorm(x), bias)
        y = x + mlp(layernorm(x))
        mlp: C to hidden, GELU, back to C

    The bias, if given, is added to the attention scores: TimeBias makes the layer causal.

    Dropout is applied to the attention weights and after every linear layer except q, k, v. The key
    bias has no effect and no gradient, since it adds the same to all scores of a query;
    qkv_bias=False leaves it out of q, k and v. nn.TransformerEncoderLayer(norm_first=True) computes
    the same, but does not compile in evaluation (torch 2.13); this one does.

    Shape:  x (B, T, C), bias (B, heads, T, T) or None -> (B, T, C); every row of the bias has at
            least one finite value
    Errors: ValueError if heads does not divide channels
    Source: Vaswani et al. 2017, arXiv:1706.03762; norm first: Xiong et al. 2020, arXiv:2002.04745;
            a bias on the scores: Press et al. 2022 (ALiBi), arXiv:2108.12409
    Needs:  F, nn
    Check:  TransformerLayer(64, heads=8, hidden=128) has 33,472 parameters
    """

    def __init__(self, channels, *, heads, hidden, dropout=0.0, qkv_bias=True):
        super().__init__()
        if channels % heads:
            raise ValueError("heads must divide channels, "
                             f"got {heads} heads for {channels} channels")
        self.heads, self.dropout = heads, dropout
        self.attention_norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias)
        self.out = nn.Sequential(nn.Linear(channels, channels), nn.Dropout(dropout))
        self.mlp_norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Dropout(dropout),
                                 nn.Linear(hidden, channels), nn.Dropout(dropout))

    def forward(self, x_btc, bias=None):
        b, t, c = x_btc.shape
        qkv = self.qkv(self.attention_norm(x_btc)).reshape(b, t, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, C / heads)
        if bias is not None:
            bias = bias.to(q.dtype)
        rate = self.dropout if self.training else 0.0
        y = v
        # on CUDA, before torch 2.10, flash attention in half precision refuses a batch of no rows
        if b:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=rate)
        x_btc = x_btc + self.out(y.transpose(1, 2).reshape(b, t, c))
        return x_btc + self.mlp(self.mlp_norm(x_btc))


class TokenHead(nn.Module):
    """Pools a feature map to a grid of tokens, mixes the tokens, and makes one logit of their mean.

        logit = linear(dropout(layernorm(mean over tokens of layers(pool to grid))))
        layers: transformer or mlp_mixer

    The map may have any size. A cell averages the pixels that it touches: cells overlap if the grid
    does not divide the map, and repeat if the map is smaller. There is no position embedding: the
    transformer does not know the position of a token, the mixer does. The transformer's MLP is
    max(128, 2C) wide; its number of heads is the largest divisor of C up to 8. On CUDA the backward
    of the pooling may add in any order (torch.use_deterministic_algorithms refuses it).

    Shape:  (B, C, H, W) -> (B, 1)
    Errors: ValueError for an unknown mixer
    Check:  with 64 channels, grid (2, 3) and 2 layers the transformer has 67,137 parameters,
            mlp_mixer 34,181
    Needs:  TransformerLayer, MixerLayer, F, nn
    """

    def __init__(self, channels, *, mixer, grid=(2, 3), layers=2, dropout=0.0):
        super().__init__()
        if mixer not in ("transformer", "mlp_mixer"):
            raise ValueError(f"mixer must be transformer or mlp_mixer, got {mixer!r}")
        heads = max(n for n in range(1, 9) if channels % n == 0)
        hidden = max(128, 2 * channels)
        self.grid = grid
        self.layers = nn.Sequential()
        for _ in range(layers):
            if mixer == "transformer":
                layer = TransformerLayer(channels, heads=heads, hidden=hidden, dropout=dropout)
            else:
                layer = MixerLayer(grid[0] * grid[1], channels, dropout=dropout)
            self.layers.append(layer)
        self.logit = nn.Sequential(
            nn.LayerNorm(channels), nn.Dropout(dropout), nn.Linear(channels, 1))

    def forward(self, x):
        tokens_btc = F.adaptive_avg_pool2d(x, self.grid).flatten(2).transpose(1, 2)
        return self.logit(self.layers(tokens_btc).mean(1))


class AvgMaxPool(nn.Module):
    """Concatenates mean and maximum over the pixels: (B, C, H, W) -> (B, 2C). Needs: nn, torch"""

    def forward(self, x):
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)


def eye_map_size(size, block, blocks):
    """Rows and columns of EyeNet's feature map; refuses a network that does not fit the image.

    The stem has stride 2 (plain 1, convnext 4). Blocks 2, 4, 6, ... have stride 2. A stride of s
    needs a map of at least s rows and s columns. Odd sides round up, but down in plain and
    convnext.

    Errors: ValueError for an unknown block, blocks < 1, or a map that is too small for a stride
            (the message says what fits)
    Check:  eye_map_size((24, 40), "baseline", 4) == (6, 10), with 8 blocks (2, 3); convnext with
            6 blocks (1, 2)
    """
    stem_stride = {"plain": 1, "baseline": 2, "inverted_se": 2, "convnext": 4}
    if block not in stem_stride:
        raise ValueError(f"block must be one of {', '.join(stem_stride)}, got {block!r}")
    if blocks < 1:
        raise ValueError(f"blocks must be at least 1, got {blocks}")
    rows, cols = size
    for i in range(0, blocks, 2):  # 0 is the stem
        stride = 2 if i else stem_stride[block]
        if min(rows, cols) < stride:
            remedy = f"1 to {i} blocks fit" if i else f"the smallest size is {stride}x{stride}"
            raise ValueError(f"{blocks} {block} blocks do not fit a size of {size[0]}x{size[1]}: "
                             f"a stride of {stride} meets a map of {rows}x{cols}; {remedy}")
        up = 0 if block in ("plain", "convnext") else stride - 1
        rows, cols = (rows + up) // stride, (cols + up) // stride
    return rows, cols


class EyeNet(nn.Module):
    """Is the eye open? A stem, `blocks` blocks of one kind, and a head that makes one logit.

        block         stem                                          blocks            head="auto"
        plain         none                                          PlainBlock        grid
        baseline      3x3 stride 2, BN, ReLU                        DepthwiseBlock    avg
        inverted_se   3x3, BN, SiLU, 3x3 stride 2, BN, SiLU         InvertedSEBlock   avgmax_mlp
        convnext      4x4 stride 4, channel LayerNorm               ConvNeXtBlock     transformer

        head
        grid          mean over the pixels of each cell of a 3x3 grid, dropout, linear
        avg           mean over pixels, BN, dropout, linear
        avgmax_mlp    mean and maximum, BN, dropout, linear to max(16, C), ReLU, dropout, linear
        transformer   TokenHead over token_grid (rows, columns) with token_layers layers
        mlp_mixer     the same

    Blocks 2, 4, 6, ... halve the map and double the channels. Block i drops its branch with
    probability stochastic_depth * i / (blocks - 1); plain blocks have no branch.

        inputs
        images        the pixels as they are
        standardised  StandardisedImage
        gradients     LocalGradients

    The grid is cut to the map if the map is smaller. `net.token_grid` is the grid in use (None
    without tokens), `net.head_kind` the head that "auto" chose. Only `size` is checked to fit;
    images of other sizes that fit are accepted too. In training BN needs more than one row per
    batch: with a pooling head torch refuses a batch of one.

    Shape:  (B, 3, H, W) normalised RGB -> (B,) logits, P(open) = sigmoid(logit)
    Errors: ValueError when built, never at the first forward: unknown names, numbers out of range,
            too many blocks for the size, a token head with fewer than 2 tokens
    Source: PINTO0309/OCEC (MIT), whose fixed grid has to divide the map: most sizes crash at its
            first forward
    Check:  channels 32, 4 blocks, head "auto": 66,337, 11,457, 118,321 and 170,145 parameters, in
            the order of the table
    Needs:  init_kaiming_xavier, conv_bn, ChannelLayerNorm, StochasticDepth, SqueezeExcite,
            StandardisedImage, LocalGradients, PlainBlock, DepthwiseBlock, InvertedSEBlock,
            ConvNeXtBlock, TransformerLayer, MixerLayer, TokenHead, AvgMaxPool, eye_map_size, F,
            math, nn, torch
    """

    def __init__(self, size=(32, 64), *, block="baseline", channels=32, blocks=4, head="auto",
                 token_grid=(2, 3), token_layers=2, dropout=0.3, stochastic_depth=0.0,
                 inputs="images"):
        super().__init__()
        self.map_size = eye_map_size(size, block, blocks)
        kinds = {"images": nn.Identity, "standardised": StandardisedImage,
                 "gradients": LocalGradients}
        if inputs not in kinds:
            raise ValueError(f"inputs must be one of {', '.join(kinds)}, got {inputs!r}")
        self.inputs, features = kinds[inputs](), 8 if inputs == "gradients" else 3
        if head == "auto":
            automatic = {"plain": "grid", "baseline": "avg", "inverted_se": "avgmax_mlp",
                         "convnext": "transformer"}
            head = automatic[block]
        if head not in ("grid", "avg", "avgmax_mlp", "transformer", "mlp_mixer"):
            raise ValueError("head must be one of auto, grid, avg, avgmax_mlp, transformer, "
                             f"mlp_mixer, got {head!r}")
        if min(channels, token_layers) < 1:
            raise ValueError("channels and token_layers must be at least 1, "
                             f"got {channels} and {token_layers}")
        self.head_kind, self.token_grid = head, None
        if head in ("transformer", "mlp_mixer"):
            self.token_grid = self._fitting_grid(token_grid)

        c = channels
        if block == "plain":
            Block, c = PlainBlock, features
            self.stem = nn.Sequential()
        elif block == "baseline":
            Block = DepthwiseBlock
            self.stem = conv_bn(features, channels, 3, stride=2, act=nn.ReLU)
        elif block == "inverted_se":
            Block = InvertedSEBlock
            self.stem = nn.Sequential(conv_bn(features, channels, 3, act=nn.SiLU),
                                      conv_bn(channels, channels, 3, stride=2, act=nn.SiLU))
        else:
            Block = ConvNeXtBlock
            self.stem = nn.Sequential(nn.Conv2d(features, channels, kernel_size=4, stride=4),
                                      ChannelLayerNorm(channels))

        self.blocks = nn.Sequential()
        for i in range(blocks):
            outputs = channels * 2 ** (i // 2)
            # halve the map where the channels double
            options = {"stride": 2 if i and i % 2 == 0 else 1}
            if block != "plain":
                options["drop_rate"] = stochastic_depth * i / max(1, blocks - 1)
            self.blocks.append(Block(c, outputs, **options))
            c = outputs

        self.head = self._make_head(c, head, token_layers, dropout)
        self.apply(init_kaiming_xavier)

    def _make_head(self, c, head, token_layers, dropout):
        """From a map of c channels to one logit."""
        if head == "grid":
            return nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Dropout(dropout),
                                 nn.Linear(9 * c, 1))
        if head == "avg":
            return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(c),
                                 nn.Dropout(dropout), nn.Linear(c, 1))
        if head == "avgmax_mlp":
            hidden = max(16, c)
            return nn.Sequential(AvgMaxPool(), nn.BatchNorm1d(2 * c), nn.Dropout(dropout),
                                 nn.Linear(2 * c, hidden), nn.ReLU(), nn.Dropout(dropout),
                                 nn.Linear(hidden, 1))
        return TokenHead(c, mixer=head, grid=self.token_grid, layers=token_layers, dropout=dropout)

    def _fitting_grid(self, token_grid):
        """The token grid, cut to the feature map. Errors: ValueError for fewer than 2 tokens."""
        map_rows, map_cols = self.map_size
        rows, cols = min(token_grid[0], map_rows), min(token_grid[1], map_cols)
        if min(rows, cols) < 1 or rows * cols < 2:
            raise ValueError(f"head {self.head_kind!r} needs a grid of at least 2 tokens, "
                             f"got {rows}x{cols} from token_grid {token_grid[0]}x{token_grid[1]} "
                             f"on a map of {map_rows}x{map_cols}: use a larger grid or size, "
                             "fewer blocks, or the head 'avg' or 'avgmax_mlp'")
        return rows, cols

    def forward(self, images_bchw):
        return self.head(self.blocks(self.stem(self.inputs(images_bchw)))).squeeze(1)


# --------------------------------------------------------------------------------------------------
# Faces: the logits of a class per pixel

# NTU CE7454 / AI6126, face parsing: a network of the challenge must have fewer parameters
FACE_PARAMETER_LIMIT = 1_821_085


def check_parameter_limit(model, limit=FACE_PARAMETER_LIMIT):
    """Refuses a network with `limit` parameters or more, and says how many are too many.

    Errors: ValueError
    Check:  check_parameter_limit(nn.Linear(3, 2), 9) passes, with 8 it is refused
    Needs:  FACE_PARAMETER_LIMIT, count_parameters
    """
    count = count_parameters(model)
    if count >= limit:
        raise ValueError(f"{type(model).__name__} has {count:,} parameters and must have fewer "
                         f"than {limit:,}: make it narrower, by {count - limit + 1:,} or more")


def check_stride_fits(size, stride):
    """Refuses (rows, columns) that are not multiples of `stride`, and names the nearest that are.

    Errors: ValueError
    Needs:  math
    Check:  (100, 128) with stride 32: the nearest sizes that fit are 96x128 and 128x128
    """
    if all(n >= stride and n % stride == 0 for n in size):
        return
    down = "x".join(str(max(1, n // stride) * stride) for n in size)
    up = "x".join(str(max(1, math.ceil(n / stride)) * stride) for n in size)
    nearest = f"size that fits is {up}" if up == down else f"sizes that fit are {down} and {up}"
    raise ValueError(f"rows and columns must be multiples of {stride}, got {size[0]}x{size[1]}: "
                     f"the nearest {nearest}")


class ReducedAttention(nn.Module):
    """Self-attention among the pixels of a map; keys and values come from a smaller map.

        y = out(softmax(q k^T / sqrt(C / heads)) v)
        q = linear(x), (k, v) = linear(r)
        r = layernorm(convolution(x)) with kernel = stride = reduction; r = x if reduction is 1

    Dropout is applied to the attention weights and to y. The key bias has no effect: it adds the
    same to all scores of a query. No key sees the rows or columns left over by the reduction.

    Shape:  (B, H, W, C) -> the same
    Errors: ValueError if heads does not divide channels
    Source: Wang et al. 2021 (PVT), arXiv:2102.12122; Xie et al. 2021 (SegFormer), arXiv:2105.15203,
            equation 2
    Check:  ReducedAttention(32, reduction=8) has 69,856 parameters; with reduction 1 it is
            nn.MultiheadAttention
    Needs:  ChannelLayerNorm, F, nn
    """

    def __init__(self, channels, *, reduction, heads=1, dropout=0.0):
        super().__init__()
        if channels % heads:
            raise ValueError("heads must divide channels, "
                             f"got {heads} heads for {channels} channels")
        self.heads, self.dropout = heads, dropout
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels)
        self.reduce = nn.Identity()
        if reduction > 1:
            self.reduce = nn.Sequential(
                nn.Conv2d(channels, channels, kernel_size=reduction, stride=reduction),
                ChannelLayerNorm(channels, eps=1e-5))
        self.out = nn.Sequential(nn.Linear(channels, channels), nn.Dropout(dropout))

    def forward(self, x_bhwc):
        b, h, w, c = x_bhwc.shape

        def split(y):  # (B, rows, columns, C) -> (B, heads, T, C / heads)
            return y.flatten(1, 2).unflatten(2, (self.heads, c // self.heads)).transpose(1, 2)

        r_bhwc = self.reduce(x_bhwc.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        k, v = self.kv(r_bhwc).chunk(2, dim=-1)
        rate = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(
            split(self.q(x_bhwc)), split(k), split(v), dropout_p=rate)
        return self.out(y.transpose(1, 2).reshape(b, h, w, c))


class MixMLP(nn.Module):
    """MLP on the channels of every pixel, with a depthwise 3x3 convolution inside (Mix-FFN).

        y = linear(gelu(conv3x3(linear(x))))

    The zero padding shows the convolution where the border is: it replaces position codes.
    depthwise=False leaves the convolution out. Dropout follows GELU and the second linear layer.

    Shape:  (B, H, W, C) -> the same, hidden width ratio * C
    Source: Xie et al. 2021 (SegFormer), arXiv:2105.15203, equation 3
    Needs:  nn
    Check:  MixMLP(32) has 4,832 parameters, 4,192 without the depthwise convolution
    """

    def __init__(self, channels, *, ratio=2, depthwise=True, dropout=0.0):
        super().__init__()
        hidden = ratio * channels
        self.widen = nn.Linear(channels, hidden)
        self.mix = nn.Identity()
        if depthwise:
            self.mix = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.narrow = nn.Sequential(
            nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, channels), nn.Dropout(dropout))

    def forward(self, x_bhwc):
        y_bchw = self.mix(self.widen(x_bhwc).permute(0, 3, 1, 2))
        return self.narrow(y_bchw.permute(0, 2, 3, 1))


class SegFormerLayer(nn.Module):
    """Transformer layer for maps, norm first.

        x = x + attention(layernorm(x))
        y = x + mlp(layernorm(x))

    Shape:  (B, H, W, C) -> the same
    Check:  SegFormerLayer(32, reduction=8) has 74,816 parameters
    Needs:  ReducedAttention, MixMLP, ChannelLayerNorm, F, nn
    """

    def __init__(self, channels, *, reduction, mix_ffn=True, dropout=0.0):
        super().__init__()
        self.attention_norm = nn.LayerNorm(channels)
        self.attention = ReducedAttention(channels, reduction=reduction, dropout=dropout)
        self.mlp_norm = nn.LayerNorm(channels)
        self.mlp = MixMLP(channels, depthwise=mix_ffn, dropout=dropout)

    def forward(self, x_bhwc):
        x_bhwc = x_bhwc + self.attention(self.attention_norm(x_bhwc))
        return x_bhwc + self.mlp(self.mlp_norm(x_bhwc))


class SegFormerStage(nn.Module):
    """Overlapping convolution and LayerNorm to a smaller map, then layers, then LayerNorm.

    Shape:  (B, inputs, H, W) -> (B, outputs, ceil(H / stride), ceil(W / stride)), in channels_last
            layout
    Check:  SegFormerStage(3, 32, kernel=7, stride=4, layers=1, reduction=8) has 79,680 parameters
    Needs:  SegFormerLayer, ReducedAttention, MixMLP, ChannelLayerNorm, F, nn
    """

    def __init__(self, inputs, outputs, *, kernel, stride, layers, reduction, mix_ffn=True,
                 dropout=0.0):
        super().__init__()
        self.embed = nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2),
                                   ChannelLayerNorm(outputs, eps=1e-5))
        self.layers = nn.Sequential()
        for _ in range(layers):
            self.layers.append(SegFormerLayer(outputs, reduction=reduction, mix_ffn=mix_ffn,
                                              dropout=dropout))
        self.norm = nn.LayerNorm(outputs)

    def forward(self, x):
        x_bhwc = self.embed(x).permute(0, 2, 3, 1)
        return self.norm(self.layers(x_bhwc)).permute(0, 3, 1, 2)


class AllMLPDecoder(nn.Module):
    """Brings maps of several sizes to one width and to the size of the first, and mixes them.

        y = linear(gelu(linear(concat_i upsample(linear_i(x_i)))))
        upsample: bilinear; linear: 1x1 convolution

    Shape:  [(B, widths[i], H_i, W_i)] -> (B, channels, H_0, W_0)
    Source: Xie et al. 2021 (SegFormer), arXiv:2105.15203, equation 4
    Needs:  F, nn, torch
    Check:  AllMLPDecoder((32, 64, 128, 192)) has 135,936 parameters
    """

    def __init__(self, widths, channels=128):
        super().__init__()
        self.project = nn.ModuleList([nn.Conv2d(width, channels, 1) for width in widths])
        self.fuse = nn.Sequential(nn.Conv2d(len(widths) * channels, channels, 1), nn.GELU(),
                                  nn.Conv2d(channels, channels, 1))

    def forward(self, maps):
        size = maps[0].shape[2:]
        maps = [F.interpolate(project(x), size, mode="bilinear", align_corners=False)
                for project, x in zip(self.project, maps)]
        return self.fuse(torch.cat(maps, dim=1))


class LMSA(nn.Module):
    """The recipe's local attention, without any bias.

        y = x + squeeze_excite(BN(1x1(depthwise 3x3(x))))

    Shape:  (B, C, H, W) -> the same
    Check:  LMSA(128) has 25,984 parameters
    Needs:  conv_bn, SqueezeExcite, nn
    """

    def __init__(self, channels):
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            conv_bn(channels, channels, 1),
            SqueezeExcite(channels, reduction=4, bias=False))

    def forward(self, x):
        return x + self.branch(x)


class MicroSegFormer(nn.Module):
    """Face parsing: four transformer stages, a decoder at 1/4 size, a linear classifier per pixel.

        stage   size   width   layers   reduction   dropout
        1       1/4    32      1        8           0.5  x dropout
        2       1/8    64      2        4           0.75 x dropout
        3       1/16   128     2        2           1    x dropout
        4       1/32   192     2        1           1.25 x dropout

        logits = upsample(classify(lmsa(decoder(maps))))

    The class logits are upsampled (bilinearly), not the 128 channels before them. A 1x1 convolution
    commutes with upsampling, so the result is the same for 6.7 times less memory. On CUDA the
    backward of the upsampling may add in any order.

    Shape:  (B, 3, H, W) normalised RGB -> (B, classes, H, W) logits; H and W are multiples of 32
    Errors: ValueError for a size that is no multiple of 32 (names the nearest), for dropout outside
            [0, 0.8), and when built with FACE_PARAMETER_LIMIT parameters or more
    Source: after Xie et al. 2021 (SegFormer), arXiv:2105.15203
    Check:  1,763,923 parameters; without Mix-FFN 1,747,923, without LMSA too 1,721,939
    Needs:  FACE_PARAMETER_LIMIT, count_parameters, check_parameter_limit, check_stride_fits,
            conv_bn, ChannelLayerNorm, SqueezeExcite, ReducedAttention, MixMLP, SegFormerLayer,
            SegFormerStage, AllMLPDecoder, LMSA, F, math, nn, torch
    """

    stride = 32

    def __init__(self, classes=19, *, lmsa=True, mix_ffn=True, dropout=0.15):
        super().__init__()
        if not 0 <= dropout < 0.8:
            raise ValueError(f"dropout must be in [0, 0.8), got {dropout}: "
                             "the last stage drops 1.25 times as much")
        stages = (  # inputs, outputs, kernel, stride, layers, reduction, rate of dropout
            (3, 32, 7, 4, 1, 8, 0.5 * dropout),
            (32, 64, 3, 2, 2, 4, 0.75 * dropout),
            (64, 128, 3, 2, 2, 2, dropout),
            (128, 192, 3, 2, 2, 1, 1.25 * dropout))
        self.stages = nn.ModuleList()
        for inputs, outputs, kernel, stride, layers, reduction, rate in stages:
            self.stages.append(SegFormerStage(
                inputs, outputs, kernel=kernel, stride=stride, layers=layers,
                reduction=reduction, mix_ffn=mix_ffn, dropout=rate))
        self.decoder = AllMLPDecoder((32, 64, 128, 192))
        self.lmsa = LMSA(128) if lmsa else nn.Identity()
        self.classify = nn.Conv2d(128, classes, 1)
        check_parameter_limit(self)

    def features(self, images_bchw):
        """The input of the classifier: (B, 128, H / 4, W / 4)."""
        check_stride_fits(images_bchw.shape[2:], self.stride)
        maps = [images_bchw]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return self.lmsa(self.decoder(maps[1:]))

    def forward(self, images_bchw):
        logits = self.classify(self.features(images_bchw))
        return F.interpolate(logits, images_bchw.shape[2:], mode="bilinear", align_corners=False)


class DilatedBlock(nn.Module):
    """Residual block of two 3x3 convolutions whose taps are `dilation` pixels apart.

        y = relu(x + BN(conv(relu(BN(conv(x))))))

    Shape:  (B, C, H, W) -> the same
    Source: He et al. 2016, arXiv:1512.03385; dilation: Yu and Koltun 2016, arXiv:1511.07122
    Check:  DilatedBlock(128, dilation=2) has 295,424 parameters
    Needs:  conv_bn, F, nn
    """

    def __init__(self, channels, *, dilation):
        super().__init__()
        self.branch = nn.Sequential(
            conv_bn(channels, channels, 3, dilation=dilation, act=nn.ReLU),
            conv_bn(channels, channels, 3, dilation=dilation))

    def forward(self, x):
        return F.relu(x + self.branch(x))


class UpBlock(nn.Module):
    """One step up in a U-Net: narrow, double the size, append the encoder's map, 3x3 convolution.

        y = relu(BN(conv(concat(upsample(relu(BN(1x1(x)))), skip))))
        upsample: bilinear

    Shape:  x (B, inputs, H, W), skip (B, outputs, 2H, 2W) -> (B, outputs, 2H, 2W)
    Source: Ronneberger et al. 2015 (U-Net), arXiv:1505.04597
    Check:  UpBlock(128, 64) has 82,176 parameters
    Needs:  conv_bn, F, nn, torch
    """

    def __init__(self, inputs, outputs):
        super().__init__()
        self.narrow = conv_bn(inputs, outputs, 1, act=nn.ReLU)
        self.mix = conv_bn(2 * outputs, outputs, 3, act=nn.ReLU)

    def forward(self, x, skip):
        x = F.interpolate(self.narrow(x), skip.shape[2:], mode="bilinear", align_corners=False)
        return self.mix(torch.cat([x, skip], dim=1))


class FaceCNN(nn.Module):
    """A plain U-Net with a dilated bottleneck, under the parameter limit of MicroSegFormer.

        encoder      at 1/2 (width), 1/4 (2 width), 1/8 (4 width): a 3x3 with stride 2 and a 3x3
        bottleneck   at 1/8: a DilatedBlock per entry of dilations, channel dropout
        decoder      UpBlock to 1/4, UpBlock to 1/2, 1x1 to the classes, logits upsampled bilinearly

    BN follows every convolution but the last, so they keep torch's initial values. A pixel of the
    bottleneck sees 2 * sum(dilations) = 30 pixels of the 1/8 map to either side, 240 of the image:
    left and right can only be distinguished in a wide view. On CUDA the backward of the upsampling
    may add in any order.

    Shape:  (B, 3, H, W) normalised RGB -> (B, classes, H, W) logits; H and W are multiples of 8
    Errors: ValueError for a size that is no multiple of 8 (names the nearest), and when built with
            FACE_PARAMETER_LIMIT parameters or more
    Source: Ronneberger et al. 2015, arXiv:1505.04597; Yu and Koltun 2016, arXiv:1511.07122
    Check:  1,572,563 parameters
    Needs:  FACE_PARAMETER_LIMIT, count_parameters, check_parameter_limit, check_stride_fits,
            conv_bn, DilatedBlock, UpBlock, F, math, nn, torch
    """

    stride = 8

    def __init__(self, classes=19, *, width=32, dilations=(1, 2, 4, 8), dropout=0.0):
        super().__init__()

        def down(inputs, outputs):
            return nn.Sequential(conv_bn(inputs, outputs, 3, stride=2, act=nn.ReLU),
                                 conv_bn(outputs, outputs, 3, act=nn.ReLU))

        self.down2 = down(3, width)
        self.down4 = down(width, 2 * width)
        self.down8 = down(2 * width, 4 * width)
        dilated = [DilatedBlock(4 * width, dilation=dilation) for dilation in dilations]
        self.bottleneck = nn.Sequential(*dilated, nn.Dropout2d(dropout))
        self.up4 = UpBlock(4 * width, 2 * width)
        self.up2 = UpBlock(2 * width, width)
        self.classify = nn.Conv2d(width, classes, 1)
        check_parameter_limit(self)

    def features(self, images_bchw):
        """The input of the classifier: (B, width, H / 2, W / 2)."""
        check_stride_fits(images_bchw.shape[2:], self.stride)
        half = self.down2(images_bchw)
        quarter = self.down4(half)
        x = self.bottleneck(self.down8(quarter))
        return self.up2(self.up4(x, quarter), half)

    def forward(self, images_bchw):
        logits = self.classify(self.features(images_bchw))
        return F.interpolate(logits, images_bchw.shape[2:], mode="bilinear", align_corners=False)


def flip_average(model, images, pairs):
    """Mean of the logits of an image and of its mirror image.

        y = (f(x) + swap(mirror(f(mirror(x))))) / 2
        swap exchanges the channels of left and right

    Shape:  images (B, C, H, W), pairs ((left, right), ...) channels -> logits as of model(images),
            (B, classes, h, w)
    Check:  flip_average of the mirror image is flip_average of the image, mirrored and swapped
    """
    logits = model(images)
    mirrored = model(images.flip(-1)).flip(-1)
    order = list(range(logits.shape[1]))
    for left, right in pairs:
        order[left], order[right] = right, left
    return (logits + mirrored[:, order]) / 2


# --------------------------------------------------------------------------------------------------
# PPG: a rate from a short signal


def sinusoidal_positions(n, channels):
    """Position codes of n tokens, to be added to them.

        p[t, 2i]     = sin(t / 10000^(2i / channels))
        p[t, 2i + 1] = cos(t / 10000^(2i / channels))

    Shape:  -> (n, channels)
    Errors: ValueError for an odd number of channels
    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5
    Needs:  math, torch
    Check:  row 0 is 0, 1, 0, 1, ...
    """
    if channels % 2:
        raise ValueError(f"channels must be even, got {channels}: sines and cosines come in pairs")
    rate = torch.exp(torch.arange(0, channels, 2) * (-math.log(10000) / channels))
    angle = torch.arange(n)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


class PPGEncoder(nn.Module):
    """Transformer over the patches of a signal.

        tokens = linear(patches) + positions
        y      = layernorm(layers(tokens))        layers: TransformerLayer

    A patch is `patch` neighbouring samples of all channels. A rest at the end that is shorter than
    a patch is dropped. The signal may have any length. The samples may be those of a waveform or
    the bins of a spectrum (data.ppg_inputs).

    Shape:  (B, channels, n) -> (B, n // patch, width)
    Errors: ValueError for a signal of other channels or shorter than a patch, heads that do not
            divide width, an odd width
    Source: Dosovitskiy et al. 2021 (ViT), arXiv:2010.11929, in one dimension
    Check:  PPGEncoder(channels=3, patch=4, width=64, depth=2) has 100,928 parameters
    Needs:  TransformerLayer, sinusoidal_positions, F, math, nn, torch
    """

    def __init__(self, *, channels=1, patch=4, width=64, depth=2, heads=4, dropout=0.1):
        super().__init__()
        self.channels, self.patch, self.width = channels, patch, width
        self.embed = nn.Linear(channels * patch, width)
        self.layers = nn.Sequential()
        for _ in range(depth):
            self.layers.append(TransformerLayer(width, heads=heads, hidden=4 * width,
                                                dropout=dropout))
        self.norm = nn.LayerNorm(width)
        sinusoidal_positions(1, width)  # refuses an odd width now, not in the first step

    def patches(self, signals):
        """(B, channels, n) -> (B, n // patch, channels * patch), channel after channel."""
        n = signals.shape[-1] // self.patch
        if signals.ndim != 3 or signals.shape[1] != self.channels or n == 0:
            raise ValueError(f"signals must be (B, {self.channels}, at least {self.patch}), "
                             f"got {tuple(signals.shape)}")
        patches = signals[..., : n * self.patch].unflatten(-1, (n, self.patch))
        return patches.transpose(1, 2).flatten(2)

    def encode(self, tokens_btc):
        """Embedded patches, or tokens in their place, to mixed tokens: (B, T, width), the same."""
        positions = sinusoidal_positions(tokens_btc.shape[1], self.width).to(tokens_btc)
        return self.norm(self.layers(tokens_btc + positions))

    def forward(self, signals):
        return self.encode(self.embed(self.patches(signals)))


class PPGRegressor(nn.Module):
    """One number, a z-scored label, from a signal: encoder, mean over the tokens, linear head.

    Shape:  (B, channels, n) -> (B,)
    Needs:  PPGEncoder, TransformerLayer, sinusoidal_positions, nn
    """

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.width, 1)

    def features(self, signals):
        """The input of the head, (B, width): with a frozen encoder the same in every epoch."""
        return self.encoder(signals).mean(1)

    def forward(self, signals):
        return self.head(self.features(signals)).squeeze(1)


class MaskedPatchModel(nn.Module):
    """Self-supervised pretraining of a PPGEncoder: hide patches and predict them from the others.

        tokens = learned token where masked, else linear(patches)
        guess  = linear(layers(tokens + positions))

    Score the guesses on masked patches only: a visible patch can be copied.

    Shape:  signals (B, channels, n), mask bool (B, n // patch) -> (B, n // patch, channels * patch)
            True in the mask is hidden
    Source: He et al. 2022 (MAE), arXiv:2111.06377; with one encoder for all tokens as in SimMIM,
            arXiv:2111.09886
    Needs:  PPGEncoder, TransformerLayer, sinusoidal_positions, nn, torch
    """

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.mask_token = nn.Parameter(0.02 * torch.randn(encoder.width))
        self.decoder = nn.Linear(encoder.width, encoder.channels * encoder.patch)

    def forward(self, signals, mask):
        tokens = self.encoder.embed(self.encoder.patches(signals))
        tokens = torch.where(mask[..., None], self.mask_token.to(tokens.dtype), tokens)
        return self.decoder(self.encoder.encode(tokens))


def random_patch_mask(b, t, ratio, *, generator=None):
    """Draws which of t patches are hidden in b rows: bool (b, t), True is hidden.

    Each row hides round(ratio * t) patches, at least 1 and never all.

    Errors: ValueError for fewer than 2 patches or a ratio outside (0, 1)
    Needs:  torch
    """
    if t < 2 or not 0 < ratio < 1:
        raise ValueError(f"{t} patches at a mask ratio of {ratio:g}: needs at least 2 patches "
                         "and a ratio between 0 and 1")
    hidden = min(max(round(ratio * t), 1), t - 1)
    order = torch.rand(b, t, generator=generator).argsort(1)
    return order < hidden


# --------------------------------------------------------------------------------------------------
# QuadModal: one embedding of several modalities


def grid_positions(rows, columns, channels):
    """Position codes of the pixels of a map, row by row: half of the channels code the row.

        p[r * columns + c] = concat(sinusoidal(r), sinusoidal(c)), both of channels / 2

    Shape:  -> (rows * columns, channels)
    Errors: ValueError if channels is not a multiple of 4
    Check:  pixel 0 is 0, 1, 0, 1, ...
    Needs:  sinusoidal_positions, math, torch
    """
    if channels % 4:
        raise ValueError(f"channels must be a multiple of 4, got {channels}: "
                         "a pair of sine and cosine for the row, one for the column")
    row = sinusoidal_positions(rows, channels // 2)
    column = sinusoidal_positions(columns, channels // 2)
    return torch.cat([row.repeat_interleave(columns, 0), column.repeat(rows, 1)], 1)


def strided_cnn(channels, size, *, width):
    """Three 3x3 convolutions with BN and ReLU, to width / 4, width / 2 and width channels.

    Each convolution halves the map; odd sides round up. One that would leave fewer than 4 pixels
    does not halve: BN then has several values to average, even for a single image.

    Shape:  (B, channels, *size) -> (B, width, about rows / 8, about columns / 8)
    Errors: ValueError for an image of a single pixel
    Check:  strided_cnn(3, (32, 32), width=64) has 23,696 parameters and a map of 4x4; a size of
            (9, 9) gives 2x2
    Needs:  conv_bn, nn
    """
    rows, columns = size
    if rows * columns < 2:
        raise ValueError(f"an image must have more than one pixel, got {rows}x{columns}: "
                         "leave the two sides out of the shape")
    layers = []
    for outputs in (width // 4, width // 2, width):
        stride = 1
        half_rows, half_columns = (rows + 1) // 2, (columns + 1) // 2
        if half_rows * half_columns >= 4:
            stride, rows, columns = 2, half_rows, half_columns
        layers.append(conv_bn(channels, outputs, 3, stride=stride, act=nn.ReLU))
        channels = outputs
    return nn.Sequential(*layers)


class VectorTokens(nn.Module):
    """A feature vector, as another network made it, to a few tokens.

        tokens = layernorm(linear_i(x)) for i in 1 ... tokens

    There are several, because attention to a single token has no choice.

    Shape:  (B, features) -> (B, tokens, width)
    Needs:  nn
    Check:  VectorTokens(512, width=64) has 131,456 parameters
    """

    def __init__(self, features, *, width, tokens=4):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(features, tokens * width),
                                   nn.Unflatten(1, (tokens, width)))
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(self.embed(x))


class SequenceTokens(PPGEncoder):
    """PPGEncoder for a sequence with the time first.

    Shape:  (B, n, channels) -> (B, n // patch, width); a rest at the end that is shorter than a
            patch is dropped
    Check:  SequenceTokens(channels=3, patch=8, width=64, depth=1, heads=8) has 51,712 parameters
    Needs:  TransformerLayer, sinusoidal_positions, PPGEncoder, F, math, nn, torch
    """

    def forward(self, x_btc):
        return super().forward(x_btc.transpose(1, 2))


class ImageTokens(nn.Module):
    """An image to the pixels of a small map.

        y = layernorm(strided_cnn(x) + grid_positions)

    Shape:  (B, channels, H, W), with (H, W) = size -> (B, T, width), T about H / 8 * W / 8
    Check:  ImageTokens(3, (32, 32), width=64) has 23,824 parameters
    Needs:  conv_bn, strided_cnn, sinusoidal_positions, grid_positions, math, nn, torch
    """

    def __init__(self, channels, size, *, width):
        super().__init__()
        self.cnn = strided_cnn(channels, size, width=width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        x = self.cnn(x)
        _, c, h, w = x.shape
        return self.norm(x.flatten(2).transpose(1, 2) + grid_positions(h, w, c).to(x))


class VideoTokens(nn.Module):
    """A video to one token per frame.

        y = SequenceTokens(mean over pixels of strided_cnn(frame)), with patches of one frame

    Shape:  (B, T, channels, H, W), with (H, W) = size -> (B, T, width)
    Check:  VideoTokens(3, (32, 32), width=64) has 77,968 parameters
    Needs:  conv_bn, strided_cnn, TransformerLayer, sinusoidal_positions, PPGEncoder,
            SequenceTokens, F, math, nn, torch
    """

    def __init__(self, channels, size, *, width, depth=1, heads=8, dropout=0.1):
        super().__init__()
        self.cnn = strided_cnn(channels, size, width=width)
        self.frames = SequenceTokens(channels=width, patch=1, width=width, depth=depth,
                                     heads=heads, dropout=dropout)

    def forward(self, x_btchw):
        means = self.cnn(x_btchw.flatten(0, 1)).mean((2, 3))
        return self.frames(means.unflatten(0, x_btchw.shape[:2]))


def modality_encoder(shape, *, width, tokens=4, heads=8, depth=1, patch=8, dropout=0.1):
    """The encoder for samples of this shape; refuses a shape that cannot be encoded.

        shape           taken for             encoder           tokens
        (F,)            a feature vector      VectorTokens      `tokens`
        (T, C)          a sequence            SequenceTokens    T // patch, the rest dropped
        (C, H, W)       an image              ImageTokens       pixels of the last map
        (T, C, H, W)    a video               VideoTokens       T

    Shape:  (B, *shape) -> (B, tokens, width)
    Errors: ValueError for another number of sides, a side of 0, a sequence shorter than a patch, an
            image of one pixel
    Needs:  conv_bn, TransformerLayer, sinusoidal_positions, PPGEncoder, grid_positions,
            strided_cnn, VectorTokens, SequenceTokens, ImageTokens, VideoTokens, F, math, nn, torch
    """
    shape = tuple(shape)
    if not 1 <= len(shape) <= 4 or min(shape) < 1:
        raise ValueError("a sample must be (F,), (T, C), (C, H, W) or (T, C, H, W), no side 0, "
                         f"got {shape}: give the shape without the batch, or reshape")
    if len(shape) == 1:
        return VectorTokens(shape[0], width=width, tokens=tokens)
    if len(shape) == 2:
        if shape[0] < patch:
            raise ValueError(f"a sequence must have at least one patch of {patch} steps, "
                             f"got {shape[0]}: use a patch of {shape[0]} or less")
        return SequenceTokens(channels=shape[1], patch=patch, width=width, depth=depth,
                              heads=heads, dropout=dropout)
    if len(shape) == 3:
        return ImageTokens(shape[0], shape[1:], width=width)
    return VideoTokens(shape[1], shape[2:], width=width, depth=depth, heads=heads, dropout=dropout)


class ModalityReadout(nn.Module):
    """The fusion tokens read one modality; a row that lacks it gets a learned vector.

        y = layernorm(tokens + attention(queries tokens, keys and values features)) where present
        y = missing elsewhere

    The features of an absent row, NaN or not, reach neither the output nor any gradient. Dropout
    is applied to the attention weights.

    Shape:  tokens (N, width), features (B, T, width), present bool (B,) -> (B, N, width)
    Source: the attention of Vaswani et al. 2017, arXiv:1706.03762; learned queries as in Jaegle et
            al. 2021 (Perceiver), arXiv:2103.03206
    Needs:  nn, torch
    Check:  ModalityReadout(64, heads=8) has 16,832 parameters
    """

    def __init__(self, width, *, heads, dropout=0.0):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.missing = nn.Parameter(0.02 * torch.randn(width))

    def forward(self, tokens, features_btc, present_b):
        present = present_b[:, None, None]
        # torch.where alone would still let 0 * NaN into the gradients
        features_btc = features_btc.masked_fill(~present, 0.0)
        queries = tokens.expand(features_btc.shape[0], -1, -1)
        y, _ = self.attention(queries, features_btc, features_btc, need_weights=False)
        y = self.norm(queries + y)
        return torch.where(present, y, self.missing.to(y.dtype))


def drop_modalities(present, rate):
    """Marks present modalities absent with probability `rate`, but never all of a row.

    In every row the modality with the largest draw is kept. So of k present ones any is dropped
    with probability rate - rate^k / k. Draws from torch's global generator.

    Shape:  bool (B, modalities) -> the same; a row without any stays without
    Needs:  torch
    Check:  at rate 0.5 one of 2 modalities is dropped in 3 of 8 rows, a single one never
    """
    draw = torch.rand(present.shape, device=present.device).masked_fill(~present, -1.0)
    return present & ((draw >= rate) | (draw == draw.amax(1, keepdim=True)))


class QuadModal(nn.Module):
    """One embedding of any number of modalities: their encoders, fusion by learned tokens, an MLP.

        features_m = modality_encoder(x_m)                  the shape decides its kind
        fused_m    = ModalityReadout(tokens, features_m)    (B, tokens, width)
        y          = layernorm(linear(gelu(layernorm(linear(concat_m fused_m)))))
        forward    = y / |y|                                widths of the MLP: hidden, embed

    `features` returns y, not normalised; `forward` and `fuse` return the L2-normalised embedding.

    `present` marks the rows that have a modality. The values of the other rows, NaN or not, are
    never encoded: they reach neither output nor gradients nor batch statistics. Rows without any
    modality all have the same embedding. In training a present modality is dropped with
    probability modality_dropout (drop_modalities). `dropout` is applied in the transformer layers,
    to the attention weights and after GELU. The order of `shapes` has no effect: weights belong to
    names, and channels come first in images and videos.

    Encoders can be run once and their tokens kept: in eval mode forward(x) is
    fuse({name: encode(name, x[name])}).

    Shape:  inputs   {name: (B, *shapes[name])}
            present  {name: bool (B,)}; a name left out: all present
            encoded  {name: (B, T, width)}, instead of the inputs of some modalities
            returns  (B, embed)
    Errors: ValueError when built, for no or unusable names, shapes that fit no encoder, a width
            that heads or 4 does not divide, numbers out of range; at forward for an unknown or
            missing modality, one given twice, other shapes
    Check:  four modalities of (128, 3): 414,272 parameters
    Needs:  conv_bn, TransformerLayer, sinusoidal_positions, PPGEncoder, grid_positions,
            strided_cnn, VectorTokens, SequenceTokens, ImageTokens, VideoTokens, modality_encoder,
            ModalityReadout, drop_modalities, F, math, nn, torch
    """

    def __init__(self, shapes, *, width=64, tokens=4, heads=8, depth=1, hidden=128, embed=64,
                 patch=8, dropout=0.1, modality_dropout=0.0):
        super().__init__()
        if not shapes:
            raise ValueError("shapes must name at least one modality, got none: "
                             "for example {'audio': (128, 3)}")
        if min(width, tokens, heads, hidden, embed, patch) < 1 or depth < 0:
            raise ValueError("width, tokens, heads, hidden, embed and patch must be at least 1 "
                             f"and depth at least 0, got {width}, {tokens}, {heads}, {hidden}, "
                             f"{embed}, {patch} and {depth}")
        step = math.lcm(heads, 4)
        if width % step:
            raise ValueError(f"width must be a multiple of heads and of 4, got width {width} with "
                             f"{heads} heads: the next width that fits is "
                             f"{math.ceil(width / step) * step}")
        if not (0 <= dropout < 1 and 0 <= modality_dropout < 1):
            raise ValueError("dropout and modality_dropout must be in [0, 1), "
                             f"got {dropout} and {modality_dropout}: 0 switches one off")
        self.width, self.modality_dropout = width, modality_dropout
        self.shapes = {name: tuple(shapes[name]) for name in sorted(shapes)}
        self.encoders, self.readouts = nn.ModuleDict(), nn.ModuleDict()
        for name, shape in self.shapes.items():
            if not name or "." in name or hasattr(self.encoders, name):
                raise ValueError(f"a modality cannot be called {name!r}: nn.ModuleDict takes no "
                                 "dots and no names of its own; rename it")
            try:
                self.encoders[name] = modality_encoder(
                    shape, width=width, tokens=tokens, heads=heads, depth=depth, patch=patch,
                    dropout=dropout)
            except ValueError as error:
                raise ValueError(f"modality {name!r}: {error}") from error
            self.readouts[name] = ModalityReadout(width, heads=heads, dropout=dropout)
        self.tokens = nn.Parameter(width ** -0.5 * torch.randn(tokens, width))
        self.head = nn.Sequential(
            nn.Linear(len(self.shapes) * tokens * width, hidden), nn.LayerNorm(hidden), nn.GELU(),
            nn.Dropout(dropout), nn.Linear(hidden, embed), nn.LayerNorm(embed))

    def encode(self, name, x):
        """Encode one modality, all rows of x: (B, *shapes[name]) -> (B, T, width)."""
        if name not in self.shapes:
            raise ValueError(f"unknown modality {name!r}: there are {', '.join(self.shapes)}")
        if x.shape[1:] != self.shapes[name]:
            sides = ", ".join(map(str, self.shapes[name]))
            raise ValueError(f"modality {name!r} must be (B, {sides}), got {tuple(x.shape)}: "
                             "cut or pad it, or build the network for this shape")
        return self.encoders[name](x)

    def encode_present(self, name, x, here):
        """Encode one modality in the rows `here`, bool (B,): (B, T, width), 0 in the other rows.

        The other rows stay out of gradients and batch statistics.
        """
        encoded = self.encode(name, x[here])
        return encoded.new_zeros(len(x), *encoded.shape[1:]).index_put((here,), encoded)

    def encode_frozen(self, inputs):
        """Tokens from the frozen encoders, {name: (B, T, width)}: the same in every epoch."""
        encoded = {}
        for name in self.shapes:
            if not any(p.requires_grad for p in self.encoders[name].parameters()):
                encoded[name] = self.encode(name, inputs[name])
        return encoded

    def features(self, inputs, present=None, *, encoded=None):
        """The embedding before the L2 norm, (B, embed)."""
        encoded, present = encoded or {}, present or {}
        self._check_inputs(inputs, encoded, present)
        present = self._rows_present(inputs | encoded, present)
        fused = []
        for name in self.shapes:
            if name in encoded:
                tokens = encoded[name]
            else:
                tokens = self.encode_present(name, inputs[name], present[name])
            fused.append(self.readouts[name](self.tokens, tokens, present[name]))
        return self.head(torch.cat(fused, 1).flatten(1))

    def forward(self, inputs, present=None, *, encoded=None):
        return F.normalize(self.features(inputs, present, encoded=encoded), dim=1)

    def fuse(self, features, present=None):
        """The normalised embedding from the tokens of all modalities, as `encode` returns them."""
        return self(inputs={}, present=present, encoded=features)

    def _check_inputs(self, inputs, encoded, present):
        """ValueError unless every modality is given once, with the same number of rows in all."""
        given = [*inputs, *encoded]
        problems = {"missing": [name for name in self.shapes if name not in given],
                    "unknown": [name for name in [*given, *present] if name not in self.shapes],
                    "given twice": [name for name in inputs if name in encoded]}
        if any(problems.values()):
            problem = "; ".join(f"{title}: {', '.join(map(str, names))}"
                                for title, names in problems.items() if names)
            raise ValueError(f"each of {', '.join(self.shapes)} is needed once, in inputs or "
                             f"encoded, but {problem}. For a modality that rows lack, give any "
                             "values and present={name: False for these rows}")
        rows = {name: x.shape[0] for name, x in (inputs | encoded).items()}
        n = rows[given[0]]
        if any(count != n for count in rows.values()):
            raise ValueError(f"modalities must have the same number of rows, got {rows}")
        for name, tokens in encoded.items():
            if tokens.ndim != 3 or tokens.shape[2] != self.width:
                raise ValueError(f"encoded {name!r} must be (B, T, {self.width}), as encode "
                                 f"returns it, got {tuple(tokens.shape)}")
        for name, mask in present.items():
            if mask.dtype != torch.bool or mask.shape != (n,):
                raise ValueError(f"present {name!r} must be a bool tensor of shape ({n},), "
                                 f"got {mask.dtype} of {tuple(mask.shape)}")

    def _rows_present(self, given, present):
        """{name: bool (B,)}: the rows that have the modality, after modality dropout."""
        x = next(iter(given.values()))
        all_rows = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
        mask = torch.stack([present.get(name, all_rows) for name in self.shapes], 1)
        if self.training and self.modality_dropout:
            mask = drop_modalities(mask, self.modality_dropout)
        return dict(zip(self.shapes, mask.unbind(1)))


def freeze_encoders(model, names):
    """Sets these encoders of a QuadModal to eval mode and switches off their gradients.

    Train with train_mode(model), which keeps them in eval mode: their dropout is then off and their
    running statistics do not change. So the tokens of a row never change, and one call of
    `model.encode` is enough.

    Warns:  if no encoder is left to train
    Errors: ValueError, and nothing is frozen, for a name that the model does not have
    Needs:  warnings
    """
    unknown = [repr(name) for name in names if name not in model.shapes]
    if unknown:
        raise ValueError(f"cannot freeze {', '.join(unknown)}: the modalities are "
                         f"{', '.join(model.shapes)}")
    for name in names:
        model.encoders[name].requires_grad_(False).eval()
    if not any(p.requires_grad for p in model.encoders.parameters()):
        warnings.warn(f"all {len(model.shapes)} encoders are frozen: only the fusion and the head "
                      "are trained", stacklevel=2)


# --------------------------------------------------------------------------------------------------
# SeqSetVAE: a sequence of sets of events


def sets_by_size(sizes, *, chunk=256):
    """Packed sets as padded batches with little padding.

    Sorts the sets by size, cuts the order into chunks, and pads a chunk to its largest set.

    sizes    int64 (S,): elements of every set, at least 1. The elements of all sets are packed one
             set after the other in one tensor (E, ...)
    returns  a list of (sets (s,), index (s, n), mask bool (s, n)): x[index] are the elements of
             those sets, where mask is True
    Needs:  torch
    Check:   sizes 1, 3, 1 in chunks of 2 give sets [0, 2] padded to 1 and set [1] padded to 3
    """
    order = sizes.argsort(stable=True)
    first = sizes.cumsum(0) - sizes
    chunks = []
    for sets in order.split(chunk):
        place = torch.arange(int(sizes[sets[-1]]), device=sizes.device)
        mask = place < sizes[sets, None]
        index = torch.where(mask, first[sets, None] + place, first[sets, None])
        chunks.append((sets, index, mask))
    return chunks


class AttentionBlock(nn.Module):
    """Queries read a set, then pass an MLP: the Set Transformer's attention block, norm first.

        h = q + attention(layernorm(q), layernorm(x))
        y = h + mlp(layernorm(h))        mlp: C to hidden, GELU, back to C

    Where mask is False an element is not read: padding changes nothing. Queries, keys and values
    have no bias, because that of the keys would have no gradient. Queries that all sets share are
    projected once.

    Shape:  q (S, N, C) or (1, N, C), x (S, M, C), mask bool (S, M) or None -> (S, N, C); each row
            of the mask has at least one True
    Errors: ValueError if heads does not divide channels
    Source: Lee et al. 2019 (Set Transformer), arXiv:1810.00825, MAB, with the norms in front: Xiong
            et al. 2020, arXiv:2002.04745
    Needs:  F, nn
    Check:  AttentionBlock(64, heads=2, hidden=128) has 33,408 parameters
    """

    def __init__(self, channels, *, heads, hidden):
        super().__init__()
        if channels % heads:
            raise ValueError("heads must divide channels, "
                             f"got {heads} heads for {channels} channels")
        self.heads = heads
        self.query_norm, self.key_norm = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.query = nn.Linear(channels, channels, bias=False)
        self.key_value = nn.Linear(channels, 2 * channels, bias=False)
        self.out = nn.Linear(channels, channels)
        self.mlp_norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels))

    def forward(self, q, x, mask=None):

        def split(y):  # (S, tokens, C) -> (S, heads, tokens, C / heads)
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        queries = split(self.query(self.query_norm(q))).expand(x.shape[0], -1, -1, -1)
        keys, values = self.key_value(self.key_norm(x)).chunk(2, -1)
        if mask is not None:
            mask = mask[:, None, None]
        y = F.scaled_dot_product_attention(queries, split(keys), split(values), attn_mask=mask)
        h = q + self.out(y.transpose(1, 2).flatten(2))
        return h + self.mlp(self.mlp_norm(h))


class InducedSetAttention(nn.Module):
    """The elements of a set read one another through a few learned points.

        h = gather(points, x)
        y = spread(x, h)        gather, spread: AttentionBlock

    The cost is linear in the size of the set. The order of the elements has no effect.

    Shape:  x (S, N, C), mask bool (S, N) or None -> (S, N, C); rows of padding have no meaning
    Source: Lee et al. 2019 (Set Transformer), arXiv:1810.00825, ISAB
    Check:  InducedSetAttention(64, heads=2, points=16) has 51,328 parameters
    Needs:  AttentionBlock, F, nn, torch
    """

    def __init__(self, channels, *, heads=2, points=16):
        super().__init__()
        self.points = nn.Parameter(channels ** -0.5 * torch.randn(points, channels))
        self.gather = AttentionBlock(channels, heads=heads, hidden=channels)
        self.spread = AttentionBlock(channels, heads=heads, hidden=channels)

    def forward(self, x, mask=None):
        return self.spread(x, self.gather(self.points[None], x, mask))


class SetEncoder(nn.Module):
    """One vector per set: levels of induced set attention, then the mean over the elements.

        x = gelu(layernorm(linear(elements)))
        y = layernorm(mean of levels(x))

    All sets are encoded together, padded in chunks of similar size (sets_by_size). Neither the
    order of the elements nor the other sets have an effect.

    Shape:  elements (E, features), one set after the other, sizes int64 (S,), no set empty
            -> (S, width)
    Check:  SetEncoder(82, width=64) has 108,224 parameters
    Needs:  sets_by_size, AttentionBlock, InducedSetAttention, F, nn, torch
    """

    def __init__(self, features, *, width, heads=2, points=16, levels=2):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(features, width), nn.LayerNorm(width), nn.GELU())
        self.levels = nn.ModuleList()
        for _ in range(levels):
            self.levels.append(InducedSetAttention(width, heads=heads, points=points))
        self.norm = nn.LayerNorm(width)

    def forward(self, elements, sizes):
        x = self.embed(elements)
        order, means = [], []
        for sets, index, mask in sets_by_size(sizes):
            y = x[index]
            for level in self.levels:
                y = level(y, mask)
            order.append(sets)
            means.append((y * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
        return self.norm(torch.cat(means)[torch.cat(order).argsort()])


def log_time_buckets(minutes, *, buckets=64, longest=2880.0):
    """The bucket of a time span; bounds are evenly spaced in log(1 + minutes).

    Spans longer than `longest` fall into the last bucket.

    Shape:  float (...), >= 0 -> int64 (...)
    Needs:  math, torch
    Check:  0 minutes are in bucket 0, 1 minute in 5, an hour in 33, a day in 58, two days in 63
    """
    scaled = torch.log1p(minutes.clamp(min=0)) / math.log1p(longest)
    return (scaled * buckets).long().clamp(max=buckets - 1)


class TimeBias(nn.Module):
    """Bias for causal attention: the older a token, the lower, at a learned rate per head.

        bias_ij = -slope * log(1 + (t_i - t_j) / tau)   for j <= i
        bias_ij = -inf                                  for j > i

    slope > 0 starts at 1, tau > 0 at 60 minutes; both are learned, as logarithms. t never decreases
    with i, so t_i - t_j >= 0. With the opposite sign the clamp at 0 would make the bias 0
    everywhere, and it would never learn.

    Shape:  minutes (B, T) -> (B, heads, T, T); minutes of padding at the end may have any value
    Needs:  math, nn, torch
    Check:  an hour apart, at the start, -log 2 = -0.693
    """

    def __init__(self, heads, *, tau=60.0):
        super().__init__()
        self.log_slope = nn.Parameter(torch.zeros(heads))
        self.log_tau = nn.Parameter(torch.full((heads,), math.log(tau)))

    def forward(self, minutes):
        gap = (minutes[:, :, None] - minutes[:, None]).clamp(min=0)[:, None]  # (B, 1, T, T)
        slope, tau = self.log_slope.exp()[:, None, None], self.log_tau.exp()[:, None, None]
        later = torch.ones(gap.shape[-2:], dtype=torch.bool, device=gap.device).triu(1)
        return (-slope * torch.log1p(gap / tau)).masked_fill(later, -math.inf)


class SetSequenceEncoder(nn.Module):
    """Encodes stays: a stay is a sequence of sets, a set holds all events of one minute.

        event   = (value * u, u), u the unit vector of the variable
        mu      = linear(SetEncoder(events of the set))
        x       = mu + sinusoidal position in the stay + embedding of the gap
        gap     = log_time_buckets(minutes since the set before)
        hidden  = layernorm(layers(x)), causal, with TimeBias

    An event is a variable and its scaled value. u is repeated, because a value of 0 would erase the
    variable. The u are fixed axes: if they were learned, reconstruction could make all of them
    equal. All sets of all stays are encoded in one call, all stays in another. Stays are packed
    like compressed rows: no padding is stored.

    Shape:  inputs   {"variables" int64 (E,), "values" (E,), "sizes" int64 (S,) events per set,
                     "minutes" (S,) since admission, "lengths" int64 (B,) sets per stay}
            returns  hidden states (B, T, width), T the longest stay; after the end of a stay they
                     have no meaning
    Source: the sets and their order: sxtforreal/SeqSetVAE (MIT); Lee et al. 2019, arXiv:1810.00825
    Check:  SetSequenceEncoder(41, width=64, depth=2) has 183,184 parameters
    Needs:  sinusoidal_positions, sets_by_size, AttentionBlock, InducedSetAttention, SetEncoder,
            log_time_buckets, TimeBias, TransformerLayer, F, math, nn, torch
    """

    def __init__(self, variables, *, width=64, depth=2, heads=8, hidden=128, set_heads=2, points=16,
                 dropout=0.15, buckets=64):
        super().__init__()
        self.variables, self.width, self.buckets = variables, width, buckets
        self.sets = SetEncoder(2 * variables, width=width, heads=set_heads, points=points)
        self.mu = nn.Linear(width, width)
        self.gap = nn.Embedding(buckets, width)
        nn.init.normal_(self.gap.weight, std=0.02)
        self.time_bias = TimeBias(heads)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList()
        for _ in range(depth):
            self.layers.append(TransformerLayer(width, heads=heads, hidden=hidden, dropout=dropout,
                                                qkv_bias=False))
        self.norm = nn.LayerNorm(width)
        sinusoidal_positions(1, width)  # refuses an odd width now, not in the first step

    def events(self, inputs):
        """(E, 2 * variables): value times unit vector, and the unit vector."""
        unit = F.one_hot(inputs["variables"], self.variables).to(inputs["values"].dtype)
        return torch.cat([inputs["values"][:, None] * unit, unit], 1)

    def sequence(self, latent, inputs):
        """Latent vectors of the sets, packed (S, width), to hidden states (B, T, width)."""
        lengths, minutes = inputs["lengths"], inputs["minutes"]
        present_bt = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
        minutes_bt = minutes.new_zeros(present_bt.shape).masked_scatter(present_bt, minutes)
        latent_btc = latent.new_zeros(*present_bt.shape, latent.shape[1])
        latent_btc = latent_btc.masked_scatter(present_bt[..., None], latent)
        gaps = minutes_bt.diff(dim=1, prepend=torch.zeros_like(minutes_bt[:, :1]))
        positions = sinusoidal_positions(minutes_bt.shape[1], self.width).to(latent_btc)
        x = latent_btc + positions + self.gap(log_time_buckets(gaps, buckets=self.buckets))
        x, bias = self.dropout(x), self.time_bias(minutes_bt)
        for layer in self.layers:
            x = layer(x, bias)
        return self.norm(x)

    def forward(self, inputs):
        mu = self.mu(self.sets(self.events(inputs), inputs["sizes"]))
        return self.sequence(mu, inputs)


class SetDecoder(nn.Module):
    """Decodes a vector to the elements of a set: modulated learned seeds, attention, linear.

        x_i = seed_i * (1 + linear(y)) + linear(y)        for i < size
        elements = linear(layernorm(block(x, x)))         block: AttentionBlock

    The seeds are scaled as well as shifted. If they were only shifted, all elements would move
    alike, and only the block could make them differ.

    Shape:  y (s, width), mask bool (s, n), the first `size` of a row True, n at most `seeds`
            -> (s, n, features)
    Errors: ValueError for more elements than seeds
    Check:  SetDecoder(82, width=64, seeds=40) has 66,258 parameters
    Needs:  AttentionBlock, F, nn, torch
    """

    def __init__(self, features, *, width, seeds, heads=2):
        super().__init__()
        self.seeds = nn.Parameter(torch.randn(seeds, width))
        self.scale, self.shift = nn.Linear(width, width), nn.Linear(width, width)
        self.block = AttentionBlock(width, heads=heads, hidden=4 * width)
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, features))
        # most entries of an event are 0: starting near 0 saves the first hundred steps
        nn.init.normal_(self.out[1].weight, std=0.02)

    def forward(self, y, mask):
        n = mask.shape[1]
        if n > len(self.seeds):
            raise ValueError(f"a set of {n} elements needs as many seeds, there are "
                             f"{len(self.seeds)}: build it with more")
        x = self.seeds[:n] * (1 + self.scale(y)[:, None]) + self.shift(y)[:, None]
        return self.out(self.block(x, x, mask))


class SeqSetVAE(nn.Module):
    """Pretraining of a SetSequenceEncoder without labels: reconstruct sets from noisy latents.

        mu, logvar = linear(SetEncoder(events))
        latent     = mu + exp(logvar / 2) * noise, mu in eval mode
        guess      = SetDecoder(hidden state at the set)

    The hidden state depends on the set itself and on those before.

    Shape:  inputs as in SetSequenceEncoder -> {"mu", "logvar": (S, width), "sets": list of chunks}
            chunk: {"sets" (s,), "guess", "target" (s, n, features), "mask" bool (s, n)}; the target
            of an event is the encoder's input for it
    Source: sxtforreal/SeqSetVAE (MIT); Kingma and Welling 2014, arXiv:1312.6114
    Needs:  sinusoidal_positions, sets_by_size, AttentionBlock, InducedSetAttention, SetEncoder,
            log_time_buckets, TimeBias, TransformerLayer, SetSequenceEncoder, SetDecoder, F, nn,
            torch
    """

    def __init__(self, encoder, *, seeds):
        super().__init__()
        self.encoder = encoder
        self.logvar = nn.Linear(encoder.width, encoder.width)
        # noise of sd 0.08: at sd 1 it drowns mu from the first step, and the latent collapses
        nn.init.constant_(self.logvar.bias, -5.0)
        self.decoder = SetDecoder(2 * encoder.variables, width=encoder.width, seeds=seeds)

    def forward(self, inputs):
        events, lengths = self.encoder.events(inputs), inputs["lengths"]
        encoded = self.encoder.sets(events, inputs["sizes"])
        mu, logvar = self.encoder.mu(encoded), self.logvar(encoded)
        latent = mu
        if self.training:
            latent = mu + torch.randn_like(mu) * (logvar / 2).exp()
        hidden_btc = self.encoder.sequence(latent, inputs)
        steps = torch.arange(hidden_btc.shape[1], device=hidden_btc.device)
        hidden = hidden_btc[steps < lengths[:, None]]  # packed again, (S, width)
        chunks = []
        for sets, index, mask in sets_by_size(inputs["sizes"]):
            chunks.append({"sets": sets, "guess": self.decoder(hidden[sets], mask),
                           "target": events[index], "mask": mask})
        return {"mu": mu, "logvar": logvar, "sets": chunks}


class StrongestEvents(nn.Module):
    """One vector of a stay: per channel the maximum over all of its events, at any time.

        x = [value * u, u, minutes / longest]
        y = layernorm(max over events of linear(gelu(layernorm(linear(x)))))

    A mean over 48 hours hides a value that was far off once, and one that was measured three times
    among a hundred sets. A maximum hides neither. The time distinguishes late events from early
    ones.

    Shape:  events (E, features) and minutes (E,) since admission, one stay after the other,
            counts int64 (B,) of events per stay, none 0 -> (B, width)
    Source: Qi et al. 2017 (PointNet), arXiv:1612.00593, eq. 1; Zaheer et al. 2017 (Deep Sets),
            arXiv:1703.06114
    Needs:  nn, torch
    Check:  StrongestEvents(82, width=64) has 9,792 parameters
    """

    def __init__(self, features, *, width, longest=2880.0):
        super().__init__()
        self.longest = longest
        self.embed = nn.Sequential(nn.Linear(features + 1, width), nn.LayerNorm(width), nn.GELU(),
                                   nn.Linear(width, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, events, minutes, counts):
        x = self.embed(torch.cat([events, (minutes / self.longest)[:, None]], 1))
        stay = torch.arange(len(counts), device=x.device).repeat_interleave(counts)
        stay = stay[:, None].expand_as(x)
        strongest = x.new_zeros(len(counts), x.shape[1])
        return self.norm(strongest.scatter_reduce(0, stay, x, "amax", include_self=False))


class SeqSetClassifier(nn.Module):
    """One logit of a stay: SetSequenceEncoder, then a head on its hidden states.

        states = [mean of the hidden states, last of them]
        logit  = head(states)                                     events=False
        logit  = head([scale * states, StrongestEvents])          events=True

    The latent vectors are mu, without noise. `scale` is small and fixed: beside states at full size
    or at a learned scale, the strongest events are learned slowly and badly.

    The head has `layers` linear layers, with width `hidden` and ReLU in all but the last. The bias
    of the last starts at the log-odds of `prior`, the share of positives: otherwise the first
    epochs only learn that positives are rare.

    Shape:  inputs as in SetSequenceEncoder -> logits (B,)
    Check:  the head at width 256, without events: 65,793 parameters
    Needs:  sinusoidal_positions, sets_by_size, AttentionBlock, InducedSetAttention, SetEncoder,
            log_time_buckets, TimeBias, TransformerLayer, SetSequenceEncoder, StrongestEvents, math,
            nn, torch
    """

    def __init__(self, encoder, *, layers=2, hidden=128, dropout=0.1, prior=0.5, events=False,
                 scale=0.1):
        super().__init__()
        self.encoder, self.scale, width = encoder, scale, encoder.width
        self.strongest = StrongestEvents(2 * encoder.variables, width=width) if events else None
        inputs = 3 * width if events else 2 * width
        self.head = nn.Sequential()
        for _ in range(layers - 1):
            layer = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Dropout(dropout))
            self.head.append(layer)
            inputs = hidden
        self.head.append(nn.Linear(inputs, 1))
        nn.init.constant_(self.head[-1].bias, math.log(prior / (1 - prior)))

    def features(self, inputs):
        """The states, (B, 2 * width): with a frozen encoder the same in every epoch."""
        hidden_btc, lengths = self.encoder(inputs), inputs["lengths"]
        steps = torch.arange(hidden_btc.shape[1], device=hidden_btc.device)
        present_bt = steps < lengths[:, None]
        mean = (hidden_btc * present_bt[..., None]).sum(1) / lengths[:, None]
        stays = torch.arange(len(hidden_btc), device=hidden_btc.device)
        last = hidden_btc[stays, lengths - 1]
        return torch.cat([mean, last], 1)

    def forward(self, inputs):
        states = self.features(inputs)
        if self.strongest is not None:
            sizes, lengths = inputs["sizes"], inputs["lengths"]
            # the stay of a set
            stay = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
            counts = torch.zeros_like(lengths).index_add(0, stay, sizes)
            minutes = inputs["minutes"].repeat_interleave(sizes)
            strongest = self.strongest(self.encoder.events(inputs), minutes, counts)
            states = torch.cat([self.scale * states, strongest], 1)
        return self.head(states).squeeze(1)
