"""The fields of a config: frozen dataclasses, and the words that some of them may be."""

import dataclasses

DISPATCHES = ("local", "gathered", "exchange", "hierarchical", "shuffled", "coherent")
INFERENCE_ONLY = ("coherent",)  # of them: not for training
AUTO = "auto"  # the one that the cost model finds fastest (auto.py); no model is built with it
COMBINES = ("exact", "partial", "reproducible")
# What `--measure` compares: rows that the cost model predicts, answers that keep all their bits.
MEASURED_DISPATCHES = ("exchange", "gathered", "hierarchical", "coherent")
MEASURED_COMBINES = ("exact", "reproducible")
WIRE_DTYPES = ("", "float8_e4m3fn")
KERNELS = ("", "reference", "cpu", "pallas_tpu", "pallas_gpu", "hopper")  # grouped_matmul.py
OVERLAP_DEGREES = (1, 2, 4, 8)
DTYPES = ("float32", "bfloat16")
MESH_AXES = ("data", "fsdp", "node", "expert", "tensor")
ATTENTIONS = ("split", "replicated")
REMATS = ("none", "layer")
PRE_ACTIVATIONS = ("recompute", "store")
FAILED_SAVES = ("stop", "go_on")
ROUTER_WEIGHTS = ("normalised", "softmax", "sparse_mixer")
NORMS = ("rms", "layer")
ROUTER_SCORES = ("softmax", "sigmoid")
GROUP_SCORES = ("", "max", "top2")
QK_NORMS = ("", "head", "all")
ATTENTION_BIASES = ("", "qkv", "qkvo")
ACTIVATIONS = ("swiglu", "clamped_swiglu")
ROPES = ("plain", "linear", "yarn", "llama3", "longrope")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary positions, and how they reach beyond those of pre-training (model/rope.py).

    A number that is no part of the kind stays at its default.
    """

    kind: str = "plain"  # of `ROPES`
    interleaved: bool = False  # pairs are neighbours, not values half a head apart
    factor: float = 1.0  # by which frequencies are divided; all kinds but plain
    original_seq_len: int = 0  # of pre-training; yarn, llama3, longrope
    attention_factor: float = 0.0  # scale of cosine and sine, 0 = by the factor; yarn, longrope
    beta_fast: float = 32.0  # yarn: pairs that turn more often than this are kept
    beta_slow: float = 1.0  # and those that turn less often are divided
    mscale: float = 0.0  # yarn: slope of the temperature of cosine and sine,
    mscale_all_dim: float = 0.0  # and of that which moves from there to latent attention's logits
    truncate: bool = True  # yarn: the ramp starts and ends at whole pairs
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()  # longrope: of each frequency
    long_factor: tuple[float, ...] = ()  # in sequences longer than `original_seq_len`


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (model/latent.py); a rank of 0: there is none.

    `d_head` is then the width of a head's keys without positions.
    """

    kv_rank: int = 0  # numbers kept of a position for all keys and values,
    d_rope: int = 0  # and those of one key for all heads, turned by the position
    d_value: int = 0  # width of a head's value
    query_rank: int = 0  # queries by way of so many numbers; 0 = from the row itself


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only MoE transformer (sizes in elements; letters as in the glossary)."""

    vocab_size: int  # V
    num_layers: int  # L
    d_model: int  # D
    num_heads: int  # H, query heads
    num_kv_heads: int  # key/value heads; divides num_heads (grouped-query attention)
    d_head: int
    d_ff: int  # F, width of one expert
    num_experts: int  # E
    top_k: int  # K
    max_seq_len: int  # the rotary range, in tokens
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    dtype: str = "float32"  # of activations; parameters and router are float32
    dispatch: str = "exchange"  # or "auto"
    # Sums at home, bits free of the placement; "partial": fewest rows; "reproducible": both.
    combine: str = "exact"
    capacity_factor: float = 0.0  # of the mean load of an expert; 0 = nothing is dropped
    wire_dtype: str = ""  # of rows to the experts: "" = dtype, or "float8_e4m3fn"; gradients: dtype
    overlap_degree: int = 1  # chunks of tokens whose exchange and experts may overlap
    kernels: str = ""  # of the experts' matmuls: a name in `KERNELS`; "" = by platform
    load_balance_coef: float = 0.01
    z_loss_coef: float = 0.001
    # What published families differ in (moe_jax/hf); names in `PARTS`.
    # Of the chosen: scaled to sum 1; "softmax": as they are; "sparse_mixer": each among its equals.
    router_weights: str = "normalised"
    router_scores: str = "softmax"  # over all experts, or the "sigmoid" of each
    router_scale: float = 1.0  # of the weights
    router_groups: int = 1  # of E / groups neighbours each, of which a token chooses among the
    router_top_groups: int = 1  # best so many,
    router_group_scores: str = ""  # by their best expert, "max", or two, "top2"; "" = all groups
    router_correction: bool = False  # a number of each expert is added for the choice alone
    qk_norm: str = ""  # RMS norm of queries and keys: of each "head", or over "all" heads together
    attention_bias: str = ""  # of projections: "qkv", or the output's too, "qkvo"
    tied_output: bool = False  # the embedding is the output projection as well
    d_ff_shared: int = 0  # width of an expert that every token visits; 0 = there is none
    shared_gate: bool = False  # its output times sigmoid(x w)
    rope: RopeConfig = RopeConfig()
    # Positions that a token attends to, itself included, layer by layer and over again: (128, 0) is
    # every other layer, 0 = all positions before it; () = all in all layers.
    windows: tuple[int, ...] = ()
    attention_sinks: bool = False  # a learned logit of each head, for what nothing is worth
    router_bias: bool = False
    expert_bias: bool = False  # of gate, up and down of each expert
    activation: str = "swiglu"  # of experts; "clamped_swiglu": (up + 1) gate sigmoid(1.702 gate)
    embedding_scale: float = 1.0  # rows of the embedding times this,
    residual_scale: float = 1.0  # what attention and experts add to the residual,
    attention_scale: float = 0.0  # and queries times keys: 0 = 1 / sqrt(d_head);
    logits_divisor: float = 1.0  # logits by this
    norm: str = "rms"  # of layers; "layer": mean and variance, with biases
    output_bias: bool = False  # of logits
    latent: LatentConfig = LatentConfig()
    # Of num_layers, the first ones: without experts; where all are, num_experts = top_k = 1.
    num_dense_layers: int = 0
    d_ff_dense: int = 0  # their width

    @property
    def num_moe_layers(self) -> int:
        """Those that plans, traces and records are about."""
        return self.num_layers - self.num_dense_layers

    @property
    def num_plan_layers(self) -> int:
        """Those of its plan: a model without MoE layers has a plan of one, which nothing reads."""
        return max(1, self.num_moe_layers)

    @property
    def kv_values(self) -> int:
        """Values that attention keeps of a token in a layer."""
        if self.latent.kv_rank:
            return self.latent.kv_rank + self.latent.d_rope
        return 2 * self.num_kv_heads * self.d_head

    @property
    def moe_layer_ids(self) -> tuple[int, ...]:
        """Their numbers in the model."""
        return tuple(range(self.num_dense_layers, self.num_layers))

    @property
    def d_rotated(self) -> int:
        """Values of a head that are turned by positions."""
        return self.latent.d_rope if self.latent.kv_rank else self.d_head


# Fields of `ModelConfig` that came later: a model without them has the digest that it had before.
PARTS = (
    *("router_weights", "qk_norm", "attention_bias", "tied_output", "d_ff_shared", "shared_gate"),
    *("rope", "router_scores", "router_scale", "router_groups", "router_top_groups"),
    *("router_group_scores", "router_correction", "router_bias", "expert_bias", "activation"),
    *("windows", "attention_sinks", "latent", "num_dense_layers", "d_ff_dense"),
    *("embedding_scale", "residual_scale", "attention_scale", "logits_divisor", "norm"),
    "output_bias",
)

# Fields of `ModelConfig` that may change and leave the weights with their meaning.
BESIDE_WEIGHTS = (
    *("dtype", "dispatch", "combine", "capacity_factor", "wire_dtype", "overlap_degree"),
    *("kernels", "load_balance_coef", "z_loss_coef", "max_seq_len"),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis.

    Tokens are split over data x fsdp x node x expert; experts over node x expert; parameters and
    optimizer state over fsdp; heads, the columns of an expert and the vocabulary over tensor.
    With `node` above 1, `expert` counts the devices of one node; a plan is for node x expert
    devices, node by node.
    """

    data: int = 1
    fsdp: int = 1
    node: int = 1
    expert: int = 1
    tensor: int = 1
    # Over node x expert, attention splits the batch ("split") or does the same work ("replicated").
    attention: str = "split"

    @property
    def expert_devices(self) -> int:
        """Devices that hold one copy of all experts together: those that a plan is for."""
        return self.node * self.expert

    @property
    def num_devices(self) -> int:
        return self.token_devices * self.tensor

    @property
    def token_devices(self) -> int:
        """Devices over which the tokens of a batch are split."""
        return self.data * self.fsdp * self.expert_devices

    def __str__(self) -> str:
        """As "data 2 x expert 4"; axes of size 1 are left out."""
        sizes = {name: getattr(self, name) for name in MESH_AXES}
        named = [f"{name} {size}" for name, size in sizes.items() if size > 1]
        return " x ".join(named) or "data 1"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Text as tokens, cut into windows; files are split into train and held-out by their name."""

    seq_len: int  # tokens a sequence, without the target of the last one
    global_batch: int  # sequences a step
    path: str = ""  # folder of text files; "" = the running Python's standard library
    max_bytes: int = 12_000_000  # stop reading after this many bytes of text
    held_out_fraction: float = 0.1
    seed: int = 0
    # A published model's folder with tokenizer.json, from the work directory on; "" = bytes.
    tokenizer: str = ""
    read_threads: int = 1  # that read windows ahead; a resumed run may have another number


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay to a tenth of the peak."""

    learning_rate: float = 3e-3
    warmup_steps: int = 20
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    b1: float = 0.9
    b2: float = 0.98


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    num_steps: int
    log_every: int = 10
    eval_every: int = 50
    eval_sequences: int = 64
    checkpoint_every: int = 100
    checkpoints_kept: int = 3  # the newest so many
    checkpoints_kept_every: int = 0  # and every so many steps; 0 = none for this
    # And so many of the lowest held-out loss, for which each step that is saved is evaluated, too;
    checkpoints_kept_best: int = 0  # 0 = none for this
    checkpoints_verified: bool = True  # False: digests are not compared at a start; it says so
    failed_save: str = "stop"  # or "go_on": train until the next save, the last one excepted
    max_bad_steps: int = 5  # bad steps in a row before the run stops
    # A loss so many standard deviations above the mean of the last `spike_window` good ones makes
    # its step bad; 0 = only what is not finite does.
    spike_sigma: float = 0.0
    spike_window: int = 64
    hang_seconds: float = 600.0  # without a finished step: say where all threads are; 0 = never
    probe_every: int = 0  # steps; several processes time each other for slow hosts; 0 = never
    hang_exit: bool = False  # and end, with exit code 75, to be started again
    # "layer": the backward pass computes each layer again from its input, and gathers its weights
    # again; "none": everything is kept, the weights that `fsdp` gathered included.
    remat: str = "none"
    # Experts' gate and up, for the backward pass: "store" keeps them (2 d_ff values a row more) and
    # saves two of eleven matmuls; kernels for TPUs, and for Hopper in 16 bits, can.
    pre_activations: str = "recompute"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class ReplanConfig:
    """Where experts live, decided again while the model trains; outputs do not change."""

    every: int = 0  # steps from one plan to the next; 0 = the plan that the run began with stays
    record_steps: int = 8  # the last so many steps before it: half of them plan, half judge
    seconds: float = 10.0  # of search, in the background
    min_gain: float = 0.0  # share of a MoE layer's predicted time that has to be saved at least
    pins: str = ""  # experts that stay on a device: LAYER:EXPERT:DEVICE,... or files of such lines


@dataclasses.dataclass(frozen=True)
class Config:
    name: str
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    mesh: MeshConfig = MeshConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    replan: ReplanConfig = ReplanConfig()
    platform: str = ""  # "cpu", "gpu", "tpu"; "" = what JAX finds
    virtual_devices: int = 0  # > 0: that many virtual CPU devices a process (platform "cpu" only)
    placement: str = ""  # plan file to train under; "" = contiguous
    # What dispatch "auto" and plans made while training go by: a name in placement/topologies or a
    # .json ("" = common links of the platform), and for "auto" a recorded trace ("" = experts
    # chosen uniformly).
    topology: str = ""
    trace: str = ""
