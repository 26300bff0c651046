"use strict";

// The page: asks the server, plays runs back, opens and exports them.
const $ = (id) => document.getElementById(id);
const PLAY_SECONDS = 0.55; // of one step
const CLOCK_STEPS = 400, CLOCK_SECONDS = 8; // a short run is slowed to last so long
const page = { meta: null, views: [], position: 0, mode: "step", playing: false, follow: true, stop: null };

const last = () => Math.max(0, ...page.views.map(({ run }) => run.frames.length - 1));
const duration = () => Math.max(1e-6, ...page.views.map(({ run }) => run.seconds));
const ends = () => (page.mode === "step" ? last() : CLOCK_STEPS);
const seconds = () => (page.position / CLOCK_STEPS) * duration();

function stepOf(run) {
  return page.mode === "step" ? Math.min(page.position, run.frames.length - 1) : run.stepAt(seconds() + 1e-9);
}

// Drawing waits for the browser, so that many frames in a moment are drawn once.
let isDue = false;
function render() {
  if (isDue) return;
  isDue = true;
  requestAnimationFrame(() => {
    isDue = false;
    draw();
  });
}

function draw() {
  const [first] = page.views;
  const hasFrames = Boolean(first?.run.frames.length);
  $("intro").hidden = Boolean(first);
  $("player").hidden = !hasFrames;
  $("export").disabled = !page.views.some(({ run }) => run.frames.length) || Boolean(page.stop);
  $("sync").hidden = page.views.length < 2;
  $("runs").classList.toggle("two", page.views.length > 1);
  if (!hasFrames) return;
  if (page.follow && page.stop) page.position = ends();
  page.position = Math.min(page.position, ends());
  page.views.forEach((view) => view.show(stepOf(view.run)));
  drawPlayer();
  drawDifference();
}

function drawPlayer() {
  const { run } = page.views.reduce((a, b) => (b.run.frames.length > a.run.frames.length ? b : a));
  const step = stepOf(run), frame = run.frames[Math.max(0, step)], isStep = page.mode === "step";
  const scrubber = $("scrubber");
  scrubber.max = ends();
  scrubber.value = page.position;
  const where = isStep ? `Step ${step + 1} of ${run.frames.length}` : `${seconds().toFixed(2)} s`;
  const detail = isStep ? `block ${frame.block + 1}` : `of ${duration().toFixed(2)} s`;
  fill($("where"), [where, "b"], detail);
  scrubber.setAttribute("aria-valuetext", `${where}, ${detail}`);
  const place = (each, index) => (isStep ? index : (each.seconds / duration()) * CLOCK_STEPS);
  Drawings.track($("track"), run.frames, ends() + 1, place, step);
  $("play").classList.toggle("playing", page.playing);
  $("play").setAttribute("aria-label", page.playing ? "Pause" : "Play");
}

function drawDifference() {
  const isShown = page.views.length > 1 && page.views.every(({ run }) => run.frames.length);
  $("difference").hidden = !isShown;
  if (!isShown) return;
  const [a, b] = page.views.map(({ run }) => ({ policy: run.policy, text: run.textAt(run.frames.length) }));
  fill($("difference-note"), ...a.text === b.text ? ["Both answers are equal."]
    : ["Marked: only in the answer of ", [a.policy, "b"], ". Struck: only in that of ", [b.policy, "b"], "."]);
  $("difference-text").replaceChildren(...Runs.difference(b.text, a.text).map(([kind, text]) => {
    const part = document.createElement({ same: "span", removed: "del", added: "ins" }[kind]);
    part.textContent = text;
    return part;
  }));
}

function showRuns(runs, position) {
  pause();
  page.views = runs.map((run) => new RunView(run, render));
  $("runs").replaceChildren(...page.views.map(({ element }) => element));
  Object.assign(page, { position, follow: true });
  render();
}

// Playing back

function seek(position) {
  page.position = Math.max(0, Math.min(ends(), position));
  page.follow = page.position === ends();
  render();
}

function play() {
  if (page.position >= ends()) seek(0);
  page.playing = true;
  const isStep = page.mode === "step";
  const perSecond = isStep ? 1 / PLAY_SECONDS : CLOCK_STEPS / Math.max(duration(), CLOCK_SECONDS);
  let before = performance.now(), exact = page.position;
  const tick = (now) => {
    if (!page.playing) return;
    exact += ((now - before) / 1000) * perSecond;
    before = now;
    seek(Math.floor(exact));
    if (page.position >= ends()) pause();
    else requestAnimationFrame(tick);
  };
  requestAnimationFrame(tick);
  render();
}

function pause() {
  page.playing = false;
  render();
}

// Asking the server

async function ask(event) {
  event.preventDefault();
  if (page.stop) return page.stop.abort();
  const policies = [$("policy").value, ...($("compare").checked ? [$("other").value] : [])];
  const prompt = $("prompt").value;
  try {
    if (!page.meta) await connect();
  } catch (error) {
    return showError(error.message);
  }
  const runs = policies.map((policy) => new Runs.Run({ meta: page.meta, prompt, policy: policy.trim() }));
  page.stop = new AbortController();
  page.mode = "step";
  document.querySelector("#sync [value=step]").checked = true;
  showRuns(runs, 0);
  $("run").textContent = "Stop";
  showError("");
  try {
    // One after the other: each has the machine for itself, so that their clocks compare.
    for (const run of runs) {
      $("status").textContent = `Running ${run.policy} …`;
      await stream(run, page.stop.signal);
    }
    $("status").textContent = "";
  } catch (error) {
    $("status").textContent = page.stop.signal.aborted ? "Stopped." : "";
    if (!page.stop.signal.aborted) showError(error.message);
  }
  page.stop = null;
  if (page.follow && page.views[0].run === runs[0]) page.position = last();
  $("run").textContent = "Run";
  $("answer").textContent = runs.map((run) => `Answer of ${run.policy}: ${run.textAt(run.frames.length)}`).join(" ");
  render();
}

async function stream(run, signal) {
  const body = {
    messages: [{ role: "user", content: run.prompt }],
    stream: true,
    stream_options: { coterie: { votes: true } },
    policy: run.policy,
    ...($("pace").value && { unmask: $("pace").value }),
  };
  const headers = { "content-type": "application/json", ...authorization() };
  const response = await fetch("v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
  if (!response.ok) throw await failure(response);
  for await (const chunk of chunks(response.body)) {
    if (chunk.error) throw new Error(chunk.error.message);
    const { earlier = [], ...frame } = chunk.coterie ?? {};
    for (const each of [...earlier, ...(chunk.coterie ? [frame] : [])]) await run.add(each);
    if (chunk.coterie) render();
  }
  run.done = true;
}

// The JSON objects of a stream of server-sent events, up to its end mark.
async function* chunks(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the server ended the answer early");
    const events = (text + value).split("\n\n");
    text = events.pop();
    for (const event of events) {
      const content = event.replace(/^data: /, "");
      if (content === "[DONE]") return;
      yield JSON.parse(content);
    }
  }
}

async function failure(response) {
  $("key-field").hidden &&= response.status !== 401;
  const document = await response.json().catch(() => null);
  return new Error(document?.error?.message ?? `the server answered ${response.status}`);
}

function authorization() {
  return $("key").value ? { authorization: `Bearer ${$("key").value}` } : {};
}

function showError(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

async function connect() {
  const response = await fetch("v1/models", { headers: authorization() });
  $("ask").hidden = false;
  if (!response.ok) throw await failure(response);
  page.meta = (await response.json()).data[0].coterie;
  // The model in the package needs two or three steps: too few to watch.
  if (page.meta.model !== "embedded") $("pace").value = "";
  describe(page.meta);
}

function describe({ model, layers, experts, k }) {
  $("model").textContent = `${model}: ${layers.length} layers with ${experts} experts, ${k} for each token`;
}

// Files

function save() {
  const file = new Blob([Runs.toFile(page.views.map(({ run }) => run))], { type: "application/json" });
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(file), download: "coterie-run.json" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

async function load(text, position) {
  try {
    const runs = await Runs.fromFile(text);
    page.stop?.abort();
    showError("");
    describe(runs[0].meta);
    $("prompt").value = runs[0].prompt;
    showRuns(runs, position);
  } catch (error) {
    showError(`Cannot open the run: ${error.message}.`);
  }
}

function onKey(event) {
  const { target, key } = event;
  if (event.ctrlKey || event.altKey || event.metaKey || !page.views.length) return;
  if (target.matches("input:not([type=range]), textarea, select") || (key === " " && target.matches("button"))) return;
  const moves = { ArrowLeft: page.position - 1, ArrowRight: page.position + 1, Home: 0, End: ends() };
  if (key === " ") page.playing ? pause() : play();
  else if (key in moves && target.type !== "range") seek(moves[key]);
  else return;
  event.preventDefault();
}

$("ask").addEventListener("submit", ask);
$("compare").addEventListener("change", () => { $("other").disabled = !$("compare").checked; });
$("key").addEventListener("change", () => connect().then(() => showError(""), (error) => showError(error.message)));
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("play").addEventListener("click", () => (page.playing ? pause() : play()));
$("scrubber").addEventListener("input", () => { pause(); seek(Number($("scrubber").value)); });
$("sync").addEventListener("change", (event) => {
  const share = page.position / (ends() || 1);
  page.mode = event.target.value;
  seek(Math.round(share * ends()));
});
$("open").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", async () => {
  const [file] = $("file").files;
  if (file) await load(await file.text(), 0);
  $("file").value = "";
});
$("export").addEventListener("click", save);
document.addEventListener("keydown", onKey);
addEventListener("resize", render);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", render);

const recorded = $("recorded");
if (recorded) load(recorded.textContent, 12);
else if (location.protocol !== "file:") connect().catch((error) => showError(error.message));
