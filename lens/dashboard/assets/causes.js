// Cause codes of a diagnosis, and metrics of its evidence, in words.

/** {who}: "Rank 3", "Ranks 2 and 3", or the component. Present tense; `past` when it is over. */
const CAUSES = {
  slow_device: ["{who} computes slower than its peers", "Slow device"],
  thermal_throttle: ["{who} is too hot and lowers its clock", "Thermal throttling"],
  power_cap: ["{who} runs into its power limit", "Power limit"],
  power_brake: ["{who} was slowed by a power brake", "Power brake"],
  ecc_remap: ["{who} has failing memory", "Memory errors"],
  shared_device: ["{who} shares its card with another process", "Shared card"],
  mixed_vendor_imbalance: ["Cards of different speed wait for each other", "Mixed cards"],
  scaleup_link_degraded: ["The link between cards of {who} is degraded", "Degraded card link"],
  pcie_downgrade: ["The PCIe link of {who} runs below its speed", "PCIe downgrade"],
  h2d_blocking: ["Copies to the device hold up {who}", "Blocking copies"],
  cpu_contention: ["{who} competes for its CPUs", "CPU contention"],
  cpu_quota: ["{who} is held back by a CPU quota", "CPU quota"],
  slow_dataloader: ["{who} waits for its own data loader", "Slow data loader"],
  input_bound: ["All ranks wait for input data", "Input bound"],
  python_gc: ["Python's garbage collector stops {who}", "Garbage collection"],
  process_stopped: ["{who} was stopped and did not run", "Process stopped"],
  memory_leak_host: ["Host memory of {who} keeps growing", "Host memory leak"],
  host_swap: ["The host of {who} is swapping", "Swapping"],
  checkpoint_stall: ["Checkpoints hold up {who}", "Checkpoint stall"],
  dataloader_worker_death: ["A data loader worker of {who} died", "Data loader worker died"],
  logging_overhead: ["Logging costs {who} time in every step", "Logging overhead"],
  memory_leak_device: ["Device memory of {who} keeps growing", "Device memory leak"],
  fragmentation: ["Device memory of {who} is fragmented", "Memory fragmentation"],
  recompilation: ["{who} keeps recompiling", "Recompilation"],
  out_of_memory: ["{who} ran out of memory", "Out of memory"],
  variable_sequence_length: ["Sequence lengths differ between ranks and steps", "Variable sequence length"],
  pipeline_imbalance: ["One pipeline stage has more work than the others", "Pipeline imbalance"],
  hot_expert: ["{who} holds an expert that gets too many tokens", "Hot expert"],
  router_collapse: ["The router sends most tokens to few experts", "Router collapse"],
  dropped_tokens: ["Many tokens are dropped at full experts", "Dropped tokens"],
  dead_expert: ["An expert gets almost no tokens", "Dead expert"],
  slow_link: ["The network link of {who} is slow", "Slow link"],
  lossy_link: ["The network link of {who} loses packets", "Lossy link"],
  congestion: ["The network is congested", "Congestion"],
  high_latency: ["Network latency is high", "High latency"],
  transport_fallback: ["Communication fell back to a slower transport", "Transport fallback"],
  collective_mismatch: ["{who} called a different collective than its peers", "Collective mismatch"],
  rank_dead: ["{who} is dead; the others wait for it", "Dead rank"],
  rank_stuck: ["{who} is stuck; the others wait for it", "Stuck rank"],
  nan_origin: ["The loss of {who} turned into NaN first", "NaN origin"],
  loss_spike: ["The loss jumped on all ranks", "Loss spike"],
  silent_corruption: ["{who} computes wrong gradients", "Silent corruption"],
  kv_cache_exhausted: ["The KV cache is full", "KV cache exhausted"],
  prefill_interference: ["Prefills hold up decoding", "Prefill interference"],
  decode_expert_imbalance: ["Experts are unevenly loaded while decoding", "Expert imbalance"],
  queue_overload: ["More requests arrive than are served", "Queue overload"],
  cold_start: ["Requests wait for a cold start", "Cold start"],
  jitter_amplification: ["Small delays of many ranks add up", "Jitter"],
  compute_bound: ["The run is bound by its own computation", "Compute bound"],
  unexplained: ["{who} is slower than its peers, and no known cause fits", "Unexplained"],
};
const METRICS = {
  "gpu.clock.sm": "SM clock",
  "hw.temperature": "temperature",
  "hw.power": "power",
  "gpu.throttle.reasons": "throttle reasons",
  "step.duration": "step time",
  "phase.duration": "phase time",
  "comm.self": "own time between collectives",
  "comm.wait": "wait for the last rank",
  "comm.transfer": "transfer time",
  "train.loss.local": "local loss",
  "train.loss": "loss",
  "train.grad_norm.local": "local gradient norm",
};

function subject(hypothesis) {
  const { ranks = [], component } = hypothesis;
  if (!ranks.length) return component ? sentenceCase(component) : "The run";
  const names = ranks.length === 1 ? `Rank ${ranks[0]}` : `Ranks ${listOf(ranks)}`;
  return component && !/^rank/.test(component) ? `${names} (${component})` : names;
}

function listOf(ranks) {
  if (ranks.length > 6) return `${ranks.slice(0, 5).join(", ")} and ${ranks.length - 5} more`;
  return `${ranks.slice(0, -1).join(", ")} and ${ranks[ranks.length - 1]}`;
}

function sentenceCase(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

/** One sentence without its full stop. */
export function sentence(hypothesis) {
  const words = CAUSES[hypothesis.cause]?.[0] ?? `{who}: ${hypothesis.cause.replace(/_/g, " ")}`;
  const plural = (hypothesis.ranks ?? []).length > 1;
  const filled = words.replace("{who}", subject(hypothesis));
  const agreed = plural && words.startsWith("{who}") ? filled.replace(/(\)|\d|more) (computes|is|runs|has|shares|competes|waits|was|keeps|holds|called)\b/, (_, before, verb) => `${before} ${PLURAL[verb]}`) : filled;
  return sentenceCase(agreed);
}
const PLURAL = { computes: "compute", is: "are", runs: "run", has: "have", shares: "share", competes: "compete", waits: "wait", was: "were", keeps: "keep", holds: "hold", called: "called" };

export function causeName(code) {
  return CAUSES[code]?.[1] ?? sentenceCase(code.replace(/_/g, " "));
}

export function metricName(metric) {
  return METRICS[metric] ?? metric;
}

/** A source as the selector and legends show it: "step time", "phase forward". */
export function sourceName(name) {
  const [metric, phase] = name.split(":");
  return phase ? `time in ${phase}` : metricName(metric);
}

/** The unit of an evidence value: as the run reports it, else by the kind of name. */
export function unitOf(metric, meta) {
  const told = meta?.metrics?.find((each) => each.metric === metric)?.unit;
  if (told) return told;
  if (/(^|\.)(duration|time|self|wait|transfer)$|^phase\.|^step\./.test(metric)) return "s";
  return { "gpu.clock.sm": "MHz", "hw.temperature": "Cel", "hw.power": "W" }[metric] ?? "";
}

/** Where the findings of a diagnosis began: marks for charts, one a finding. */
export function onsetMarks(diagnosis) {
  const seen = new Map();
  for (const each of diagnosis?.hypotheses ?? []) {
    if (each.severity === "info" || each.onset_step === null || each.onset_step === undefined || seen.has(each.finding)) continue;
    seen.set(each.finding, { step: each.onset_step, text: causeName(each.cause).toLowerCase() });
  }
  return [...seen.values()];
}
