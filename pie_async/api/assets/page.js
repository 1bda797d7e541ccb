"use strict";
// Everything that the server sends becomes text (textContent) or numbers, never markup.

const $ = (id) => document.getElementById(id);
const base = location.pathname.endsWith("/") ? location.pathname : location.pathname + "/";
const WINDOW_S = 8;
const STATES = [
  ["r", "resident", "--resident"], ["c", "cached", "--cached"], ["S", "staged now", "--staged"],
  ["s", "streamed", "--streamed"], ["p", "parked", "--parked"], ["k", "spare copy", "--spare"],
  ["o", "leaving", "--moving"], ["i", "arriving", "--moving"], [".", "free", "--free"],
  ["_", "not pinned", "--unpinned"],
];
const TRACKS = [["compute", "compute"], ["stall", "waits"], ["h2d", "to device"], ["d2h", "to pool"]];

let key = "";            // the API key, while this page is open
let isPaused = false;
let frame = null;        // the last one drawn
let spans = [];          // of the last WINDOW_S
let paces = new Map();   // sequence -> [time, output tokens, tokens/s]
let colours = {};
let follower = null;     // aborts the stream of frames

// --- words ----------------------------------------------------------------------------------

const whole = new Intl.NumberFormat("en");
const count = (n) => whole.format(Math.round(n));
function size(bytes) {
  for (const [unit, of] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]])
    if (bytes >= of) return (bytes / of).toFixed(1) + " " + unit;
  return Math.round(bytes) + " B";
}
function rate(bytes) {
  for (const [unit, of] of [["GB/s", 1e9], ["MB/s", 1e6], ["kB/s", 1e3]])
    if (bytes >= of) return (bytes / of).toFixed(1) + " " + unit;
  return Math.round(bytes) + " B/s";
}
function ago(s) {
  if (s < 1.5) return "now";
  return s < 90 ? Math.round(s) + " s ago" : s < 5400 ? Math.round(s / 60) + " min ago" : Math.round(s / 3600) + " h ago";
}
const say = (id, text) => { const it = $(id); if (it.textContent !== text) it.textContent = text; };
function add(parent, tag, text, className) {
  const it = document.createElement(tag);
  if (text !== undefined) it.textContent = text;
  if (className) it.className = className;
  parent.append(it);
  return it;
}

// --- following the server -------------------------------------------------------------------

const headers = (more) => key ? { Authorization: "Bearer " + key, ...more } : { ...more };

async function* events(response) {
  const decoder = new TextDecoder();
  let rest = "";
  for (const reader = response.body.getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += decoder.decode(value, { stream: true });
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      let kind = "message", data = "";
      for (const line of part.split("\n")) {
        if (line.startsWith("event: ")) kind = line.slice(7);
        else if (line.startsWith("data: ")) data += line.slice(6);
      }
      if (data) yield [kind, data];
    }
  }
}

function status(state, text) {
  $("status").dataset.state = state;
  say("status", text);
}

async function follow() {
  const abort = follower = new AbortController();
  for (let pause = 1; !abort.signal.aborted; pause = Math.min(2 * pause, 8)) {
    try {
      const response = await fetch(base + "view", { headers: headers(), signal: abort.signal });
      if (response.status === 401) return askForKey();
      if (!response.ok) throw new Error((await response.json()).error.message);
      $("key").hidden = true;
      for await (const [kind, data] of events(response)) {
        if (abort.signal.aborted) return;
        pause = 0.5;
        if (kind === "frame") take(JSON.parse(data));
        else status("trouble", JSON.parse(data).message);
      }
      status("trouble", "the server stopped");
    } catch (error) {
      if (abort.signal.aborted) return;
      status("trouble", error instanceof TypeError ? "no connection" : error.message);
    }
    await new Promise((over) => setTimeout(over, 1000 * pause));
  }
}

function askForKey() {
  status("trouble", key ? "that key is not known here" : "an API key is needed");
  $("key").hidden = false;
  $("key-text").focus();
}

$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key-text").value.trim();
  $("key-text").value = "";
  follow();
});
function watchAgain() {
  if (follower) follower.abort();
  if (!isPaused && !document.hidden && $("key").hidden) follow();
}
$("pause").addEventListener("click", () => {
  isPaused = !isPaused;
  $("pause").setAttribute("aria-pressed", isPaused);
  say("pause", isPaused ? "Go on" : "Pause");
  if (isPaused) status("waiting", "paused");
  watchAgain();
});
document.addEventListener("visibilitychange", watchAgain); // a hidden page costs the server nothing

// --- drawing --------------------------------------------------------------------------------

function take(next) {
  if (frame && next.view.now_s < frame.view.now_s) { spans = []; paces = new Map(); } // a new engine
  frame = next;
  const now = next.view.now_s;
  for (const span of next.view.spans) spans.push(span);
  spans = spans.filter((span) => span.end_s > now - WINDOW_S - 1);
  status("live", next.is_accepting ? "live" : "draining");
  draw();
}

function draw() {
  if (!frame) return;
  const view = frame.view, stats = view.stats;
  document.title = `${count(frame.output_tokens_per_s)} tok/s · pie_async`;
  say("model", `${frame.model} · ${frame.version}`);
  say("tile-output", count(frame.output_tokens_per_s));
  say("tile-prompt", count(frame.prompt_tokens_per_s));
  say("tile-running", String(stats.running));
  const others = [["waiting", stats.waiting], ["parked", stats.parked], ["paused", stats.paused]];
  say("tile-queued", others.filter(([, n]) => n).map(([name, n]) => `${n} ${name}`).join(", ") || "running");
  say("tile-expansion", stats.expansion_ratio.toFixed(2) + "×");
  say("tile-streamed", `${count(stats.streamed_blocks)} blocks streamed`);
  say("tile-stall", (100 * frame.stall_share).toFixed(1) + " %");
  drawMaps(view.memory, stats);
  drawTimeline(view.now_s);
  drawGauge("h2d", frame.h2d);
  drawGauge("d2h", frame.d2h);
  drawGovernor(view, stats);
  drawRequests(view);
}

function readColours() {
  const style = getComputedStyle(document.documentElement);
  const names = [...STATES.map(([, , name]) => name), "--compute", "--prefill", "--stall", "--h2d", "--d2h", "--line", "--soft"];
  colours = Object.fromEntries(names.map((name) => [name, style.getPropertyValue(name).trim()]));
}

function brush(canvas) {
  const scale = devicePixelRatio || 1, box = canvas.getBoundingClientRect();
  const width = Math.round(box.width * scale), height = Math.round(box.height * scale);
  if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, box.width, box.height);
  return [pen, box.width, box.height];
}

const colourOf = Object.fromEntries(STATES.map(([letter, , name]) => [letter, name]));

// One row for each layer, one column for each cell; a gap sets layer groups apart.
function drawMap(id, cells, memory, letterIn) {
  const [pen, width, height] = brush($(id));
  const gap = memory.num_layers > 40 ? 1 : 2, groups = memory.groups.length;
  const row = (height - gap * (groups - 1)) / memory.num_layers;
  const column = cells.length ? width / cells.length : width;
  const slit = column > 5 ? 1 : 0, line = row > 4 ? 1 : 0;
  for (let group = 0, layer = 0; group < groups; group++) {
    const end = group + 1 < groups ? memory.groups[group + 1] : memory.num_layers;
    for (; layer < end; layer++) {
      const y = layer * row + group * gap;
      for (let at = 0; at < cells.length; at++) {
        pen.fillStyle = colours[colourOf[letterIn(cells[at], group)]];
        pen.fillRect(at * column, y, column - slit, row - line);
      }
      if (!cells.length) { pen.fillStyle = colours["--unpinned"]; pen.fillRect(0, y, width, row - line); }
    }
  }
}

function drawMaps(memory, stats) {
  const staged = new Set(memory.staged_groups);
  const same = (letter) => letter;
  drawMap("map-arena", memory.arena, memory, same);
  drawMap("map-ring", memory.ring, memory, (letter, group) => letter === "s" && staged.has(group) ? "S" : letter);
  drawMap("map-pool", memory.pool, memory, same);
  say("cap-arena", `${size(stats.device_blocks * stats.block_bytes)}, ${count(memory.arena_slots)} blocks`);
  say("cap-ring", `room for ${count(memory.ring_slots)} blocks, ${memory.ring_depth} of ${memory.groups.length} layer groups at a time`);
  say("cap-pool", `${size(stats.host_blocks * stats.block_bytes)} of up to ${size(memory.pool_slots * stats.block_bytes)}`);
  say("map-note", `A row is a layer (${memory.num_layers}), a column up to ${Math.max(1, Math.ceil(memory.pool_slots / 96))} blocks of ${size(stats.block_bytes)}.`);
  $("map-arena").setAttribute("aria-label", `device arena: ${stats.resident_blocks} of ${stats.device_blocks} blocks in use, ${stats.cached_blocks} cached`);
  $("map-ring").setAttribute("aria-label", `staging ring: ${stats.streamed_blocks} blocks streamed in every iteration`);
  $("map-pool").setAttribute("aria-label", `pool: ${stats.pooled_blocks} of ${stats.host_blocks} blocks in use`);
  const spare = Math.max(0, stats.pooled_blocks - stats.streamed_blocks - stats.parked_blocks);
  const known = {
    r: stats.resident_blocks, c: stats.cached_blocks, s: stats.streamed_blocks, p: stats.parked_blocks, k: spare,
    ".": stats.device_blocks - stats.resident_blocks - stats.cached_blocks + stats.host_blocks - stats.pooled_blocks,
    _: memory.pool_slots - stats.host_blocks,
  };
  const legend = $("legend");
  if (!legend.children.length)
    for (const [letter, name] of STATES) {
      const item = add(legend, "li");
      add(item, "i").style.background = `var(${colourOf[letter]})`;
      item.append(name + " ");
      add(item, "b").dataset.letter = letter;
    }
  for (const it of legend.querySelectorAll("b")) {
    const n = known[it.dataset.letter];
    const text = n === undefined ? "" : count(n);
    if (it.textContent !== text) it.textContent = text;
  }
}

function drawTimeline(now) {
  const [pen, width, height] = brush($("time"));
  const left = 70, row = (height - 18) / TRACKS.length, start = now - WINDOW_S;
  const x = (s) => left + (width - left) * (s - start) / WINDOW_S;
  pen.font = "12px system-ui, sans-serif";
  pen.textBaseline = "middle";
  TRACKS.forEach(([track, name], number) => {
    const y = number * row;
    pen.fillStyle = colours["--free"];
    pen.fillRect(left, y + 3, width - left, row - 6);
    pen.fillStyle = colours["--soft"];
    pen.fillText(name, 0, y + row / 2);
    for (const span of spans) {
      if (span.track !== track || span.end_s <= start) continue;
      const from = Math.round(x(Math.max(span.start_s, start)));
      pen.fillStyle = colours[span.doing === "prefill" ? "--prefill" : "--" + track];
      pen.fillRect(from, y + 3, Math.max(1, Math.round(x(span.end_s)) - from), row - 6);
    }
  });
  pen.fillStyle = colours["--soft"];
  for (let s = 0; s <= WINDOW_S; s += 2) {
    pen.textAlign = s === 0 ? "right" : s === WINDOW_S ? "left" : "center";
    pen.fillText(s ? `−${s} s` : "now", x(now - s), height - 8);
  }
  pen.textAlign = "left";
  const seen = spans.filter((span) => span.track === "compute" && span.end_s > start);
  const iterations = seen.length / WINDOW_S;
  say("time-note", seen.length ? `${iterations.toFixed(iterations < 10 ? 1 : 0)} iterations/s. Violet computes prompts; red is time that compute waited for copies, as a sum at each iteration's begin.` : "Nothing was computed.");
  $("time").setAttribute("aria-label", `timeline of ${WINDOW_S} seconds: ${seen.length} iterations, ${(100 * frame.stall_share).toFixed(1)} percent of compute time spent waiting for copies`);
}

function drawGauge(id, gauge) {
  const share = gauge.peak_bytes_per_s ? Math.min(1, gauge.bytes_per_s / gauge.peak_bytes_per_s) : 0;
  $(id).firstElementChild.style.width = (100 * share).toFixed(1) + "%";
  $(id).setAttribute("aria-valuenow", (100 * share).toFixed(0));
  say(id + "-text", gauge.peak_bytes_per_s ? `${rate(gauge.bytes_per_s)} of ${rate(gauge.peak_bytes_per_s)} measured` : `${rate(gauge.bytes_per_s)}; no peak measured yet`);
}

function drawGovernor(view, stats) {
  say("gov-now", `May stream ${count(stats.streamed_limit_blocks)} blocks; streams ${count(stats.streamed_blocks)}.`);
  const rows = view.limits.map((each) => [ago(view.now_s - each.at_s), each.cause, each.reason]).reverse();
  fill($("gov-list"), rows, "li", ([when, cause, reason], item) => {
    add(item, "span", when); add(item, "b", cause); add(item, "span", reason);
  });
}

// Rows are made anew only where their text changed: selections and focus stay.
function fill(parent, rows, tag, make) {
  rows.forEach((row, at) => {
    const text = JSON.stringify(row);
    let item = parent.children[at];
    if (item && item.dataset.text === text) return;
    if (!item) item = add(parent, tag);
    item.textContent = "";
    item.dataset.text = text;
    make(row, item);
  });
  while (parent.children.length > rows.length) parent.lastElementChild.remove();
}

function pace(sequence, tokens, now) {
  const [since, before, last] = paces.get(sequence) || [now, tokens, 0];
  if (now - since < 1) { paces.set(sequence, [since, before, last]); return last; }
  const found = (tokens - before) / (now - since);
  paces.set(sequence, [now, tokens, found]);
  return found;
}

function drawRequests(view) {
  const rows = view.sequences.map((each) => [
    each.name || "sequence " + each.sequence, each.state,
    count(each.prompt_tokens) + (each.cached_tokens ? ` (${count(each.cached_tokens)} cached)` : ""),
    `${count(each.output_tokens)} of ${count(each.max_tokens)}`,
    pace(each.sequence, each.output_tokens, view.now_s).toFixed(0),
    Math.round(100 * each.pooled_share),
  ]);
  const kept = new Set(view.sequences.map((each) => each.sequence));
  for (const sequence of paces.keys()) if (!kept.has(sequence)) paces.delete(sequence);
  fill($("req-rows"), rows, "tr", (row, item) => {
    row.slice(0, 5).forEach((text, at) => add(item, "td", text, at > 1 ? "n" : ""));
    const cell = add(item, "td", row[5] + " %", "n");
    add(add(cell, "span", undefined, "bar"), "i").style.width = row[5] + "%";
  });
  $("req-none").hidden = rows.length > 0;
  $("req-rows").closest(".scroll").hidden = rows.length === 0;
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readColours(); draw(); });
new ResizeObserver(draw).observe(document.body);

// --- the chat -------------------------------------------------------------------------------

let turns = [];
let answering = null;

$("chat-text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("chat").requestSubmit(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && answering) answering.abort(); });
$("chat-new").addEventListener("click", () => {
  if (answering) answering.abort();
  turns = [];
  $("chat-log").textContent = "";
  $("chat-text").focus();
});
$("chat").addEventListener("submit", (event) => {
  event.preventDefault();
  if (answering) return answering.abort();
  const text = $("chat-text").value.trim();
  if (text) { $("chat-text").value = ""; ask(text); }
});

function write(text, className) {
  const log = $("chat-log"), paragraph = add(log, "p", text, className);
  log.scrollTop = log.scrollHeight;
  return paragraph;
}

async function ask(text) {
  const log = $("chat-log");
  write(text, "user");
  const shown = write("", "assistant");
  const abort = answering = new AbortController();
  say("chat-send", "Stop");
  const began = performance.now();
  let first = 0, tokens = 0, isWhole = false;
  try {
    const response = await fetch(base + "v1/chat/completions", {
      method: "POST", signal: abort.signal, headers: headers({ "Content-Type": "application/json" }),
      body: JSON.stringify({
        model: frame ? frame.model : undefined, stream: true, stream_options: { include_usage: true },
        max_tokens: Number($("chat-max").value) || 200, temperature: Number($("chat-heat").value),
        messages: [...turns, { role: "user", content: text }],
      }),
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const [, data] of events(response)) {
      if (data === "[DONE]") { isWhole = true; break; }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.usage) tokens = chunk.usage.completion_tokens;
      const content = chunk.choices[0]?.delta?.content;
      if (!content) continue;
      first = first || performance.now();
      const isAtEnd = log.scrollTop + log.clientHeight > log.scrollHeight - 40;
      shown.textContent += content;
      if (isAtEnd) log.scrollTop = log.scrollHeight;
    }
    if (!isWhole) throw new Error("the answer broke off");
    const took = (performance.now() - first) / 1000;
    if (first) write(`first token after ${Math.round(first - began)} ms, then ${took > 0 ? count(Math.max(0, tokens - 1) / took) : "–"} tokens/s`, "note");
  } catch (error) {
    if (abort.signal.aborted) write("stopped", "note");
    else write(error.message, "trouble");
  } finally {
    if (answering === abort) { answering = null; say("chat-send", "Send"); }
  }
  turns.push({ role: "user", content: text }, { role: "assistant", content: shown.textContent });
  if (!shown.textContent) { shown.remove(); turns.splice(-2); }
}

readColours();
follow();
