// Cause codes of a diagnosis, and metrics of its evidence, in words.

import { list } from "./format.js";

/** Of each code: a sentence ({who}: "Rank 3", "Ranks 2 and 3", or the component), a short name, and where it can be
 *  seen: a page, behind it the metric that the page should show. */
const CAUSES = {
  slow_device: ["{who} computes slower than its peers", "Slow device", "hardware"],
  thermal_throttle: ["{who} is too hot and lowers its clock", "Thermal throttling", "hardware"],
  power_cap: ["{who} runs into its power limit", "Power limit", "hardware"],
  power_brake: ["{who} was slowed by a power brake", "Power brake", "hardware"],
  ecc_remap: ["{who} has failing memory", "Memory errors", "hardware"],
  shared_device: ["{who} shares its card with another process", "Shared card", "hardware"],
  mixed_vendor_imbalance: ["Cards of different speed wait for each other", "Mixed cards", "hardware"],
  scaleup_link_degraded: ["The link between cards of {who} is degraded", "Degraded card link", "communication"],
  pcie_downgrade: ["The PCIe link of {who} runs below its speed", "PCIe downgrade", "hardware"],
  h2d_blocking: ["Copies to the device hold up {who}", "Blocking copies", "ranks phase.duration:h2d"],
  cpu_contention: ["{who} competes for its CPUs", "CPU contention", "ranks comm.self"],
  cpu_quota: ["{who} is held back by a CPU quota", "CPU quota", "ranks comm.self"],
  slow_dataloader: ["{who} waits for its own data loader", "Slow data loader", "ranks phase.duration:data"],
  input_bound: ["All ranks wait for input data", "Input bound", "ranks phase.duration:data"],
  python_gc: ["Python's garbage collector stops {who}", "Garbage collection", "ranks comm.self"],
  process_stopped: ["{who} was stopped and did not run", "Process stopped", "ranks comm.self"],
  memory_leak_host: ["Host memory of {who} keeps growing", "Host memory leak", "memory"],
  host_swap: ["The host of {who} is swapping", "Swapping", "memory"],
  checkpoint_stall: ["Checkpoints hold up {who}", "Checkpoint stall", "ranks phase.duration:checkpoint"],
  dataloader_worker_death: ["A data loader worker of {who} died", "Data loader worker died", "ranks phase.duration:data"],
  logging_overhead: ["Logging costs {who} time in every step", "Logging overhead", "ranks phase.duration:logging"],
  memory_leak_device: ["Device memory of {who} keeps growing", "Device memory leak", "memory"],
  fragmentation: ["Device memory of {who} is fragmented", "Memory fragmentation", "memory"],
  recompilation: ["{who} keeps recompiling", "Recompilation", "steps"],
  out_of_memory: ["{who} ran out of memory", "Out of memory", "memory"],
  variable_sequence_length: ["Sequence lengths differ between ranks and steps", "Variable sequence length", "ranks comm.self"],
  pipeline_imbalance: ["One pipeline stage has more work than the others", "Pipeline imbalance", "ranks comm.self"],
  hot_expert: ["{who} holds an expert that gets too many tokens", "Hot expert", "experts"],
  router_collapse: ["The router sends most tokens to few experts", "Router collapse", "experts"],
  dropped_tokens: ["Many tokens are dropped at full experts", "Dropped tokens", "experts"],
  dead_expert: ["An expert gets almost no tokens", "Dead expert", "experts"],
  slow_link: ["The network link of {who} is slow", "Slow link", "communication"],
  lossy_link: ["The network link of {who} loses packets", "Lossy link", "communication"],
  congestion: ["The network is congested", "Congestion", "communication"],
  high_latency: ["Network latency is high", "High latency", "communication"],
  transport_fallback: ["Communication fell back to a slower transport", "Transport fallback", "communication"],
  collective_mismatch: ["{who} called a different collective than its peers", "Collective mismatch", "steps"],
  rank_dead: ["{who} is dead; the others wait for it", "Dead rank", "steps"],
  rank_stuck: ["{who} is stuck; the others wait for it", "Stuck rank", "steps"],
  nan_origin: ["The loss of {who} turned into NaN first", "NaN origin", "ranks train.loss.local"],
  loss_spike: ["The loss jumped on all ranks", "Loss spike", "ranks train.loss.local"],
  silent_corruption: ["{who} computes wrong gradients", "Silent corruption", "ranks train.grad_norm.local"],
  kv_cache_exhausted: ["The KV cache is full", "KV cache exhausted", "memory"],
  prefill_interference: ["Prefills hold up decoding", "Prefill interference", "steps"],
  decode_expert_imbalance: ["Experts are unevenly loaded while decoding", "Expert imbalance", "experts"],
  queue_overload: ["More requests arrive than are served", "Queue overload", "steps"],
  cold_start: ["Requests wait for a cold start", "Cold start", "steps"],
  jitter_amplification: ["Small delays of many ranks add up", "Jitter", "ranks comm.self"],
  compute_bound: ["The run is bound by its own computation", "Compute bound", "steps"],
  unexplained: ["{who} is slower than its peers, and no known cause fits", "Unexplained", "ranks comm.self"],
};
const METRICS = {
  "gpu.clock.sm": "SM clock",
  "hw.temperature": "temperature",
  "hw.power": "power",
  "gpu.throttle.reasons": "throttle reasons",
  "step.duration": "step time",
  "step.self": "own time",
  "phase.duration": "phase time",
  "comm.self": "own time between collectives",
  "comm.wait": "wait for the last rank",
  "comm.transfer": "transfer time",
  "pipeline.bubble": "idle share of the passes",
  "train.loss.local": "local loss",
  "train.loss": "loss",
  "train.grad_norm.local": "local gradient norm",
};

function subject(hypothesis) {
  const { ranks = [], component } = hypothesis;
  if (!ranks.length) return component ? sentenceCase(componentName(component)) : "The run";
  const names = ranks.length === 1 ? `Rank ${ranks[0]}` : `Ranks ${list(ranks)}`;
  return component && !/^rank/.test(component) ? `${names} (${componentName(component)})` : names;
}

/** "expert 5 of layer 2"; what has a name of its own, such as host3/gpu1, keeps it. */
function componentName(component) {
  return component.replace(/^layer(\d+)\/expert(\d+)$/, "expert $2 of layer $1").replace(/^stage(\d+)$/, "pipeline stage $1");
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

/** Where a cause can be seen: the page, and the metric that it should show or null. */
export function placeOf(code) {
  const [page, metric] = (CAUSES[code]?.[2] ?? "ranks").split(" ");
  return { page, metric: metric ?? null };
}

/** A metric in words; "comm.wait/layer3" is that of one layer. */
export function metricName(metric) {
  const [name, layer] = metric.split("/layer");
  const words = METRICS[name] ?? name;
  return layer === undefined ? words : `${words} in layer ${layer}`;
}

/** A source as the selector and legends show it: "step time", "phase forward". */
export function sourceName(name) {
  const [metric, phase] = name.split(":");
  return phase ? `time in ${phase}` : metricName(metric);
}

/** The unit of an evidence value: as the run reports it, else by the kind of name. */
export function unitOf(each, meta) {
  const [metric] = each.split("/layer");
  const told = meta?.metrics?.find((each) => each.metric === metric)?.unit;
  if (told) return told;
  if (/(^|\.)(duration|time|self|wait|transfer)$|^phase\.|^step\./.test(metric)) return "s";
  return { "gpu.clock.sm": "MHz", "hw.temperature": "Cel", "hw.power": "W" }[metric] ?? "";
}

/** The findings of a diagnosis in its order, each its best hypothesis with the rival explanations.
 *  @returns {{best: object, rivals: object[]}[]} */
export function findingsOf(diagnosis) {
  const found = new Map();
  for (const each of diagnosis?.hypotheses ?? []) {
    if (found.has(each.finding)) found.get(each.finding).rivals.push(each);
    else found.set(each.finding, { best: each, rivals: [] });
  }
  return [...found.values()];
}

/** The findings that are more than information. */
export function troubles(diagnosis) {
  return findingsOf(diagnosis).filter(({ best }) => best.severity !== "info");
}

/** The ranks that the verdict names as where a trouble sits. @returns {Set<number>} */
export function blamedRanks(diagnosis) {
  return new Set(troubles(diagnosis).flatMap(({ best }) => best.ranks ?? []));
}

/** Where the troubles began: marks for charts. */
export function onsetMarks(diagnosis) {
  const begun = troubles(diagnosis).filter(({ best }) => Number.isInteger(best.onset_step));
  return begun.map(({ best }) => ({ step: best.onset_step, text: causeName(best.cause).toLowerCase() }));
}
