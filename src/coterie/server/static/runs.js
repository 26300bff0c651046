"use strict";

// Runs: their canvas, votes and elections at each step. Nothing here touches the page.
const Runs = (() => {
  const ELECTED = 1, RESIDENT = 2, HIGH = 4; // bits of an expert's state
  const DIFF_WORDS = 3000; // longer texts are compared whole
  const MAX_COUNT = 1e6; // of positions, experts and steps, in files of any origin

  // One answer under one policy. Frames come from a stream or a file; votes are unpacked on arrival.
  class Run {
    constructor({ meta, prompt, policy }) {
      Object.assign(this, { meta, prompt, policy, frames: [], votes: [], done: false });
    }

    async add(frame) {
      checkFrame(frame);
      const votes = frame.votes ? await unpack(frame.votes, this.meta.experts) : null;
      this.frames.push(frame);
      this.votes.push(votes);
    }

    // The last frame at or before a time in seconds; -1 if there is none.
    stepAt(seconds) {
      return this.frames.findLastIndex((frame) => frame.seconds <= seconds);
    }

    get seconds() {
      return this.frames.at(-1)?.seconds ?? 0;
    }

    textAt(step) {
      return this.frames.slice(0, step + 1).map((frame) => frame.text).join("");
    }
  }

  // Bytes that were deflated and written in base64.
  async function inflate(code) {
    const bytes = Uint8Array.from(atob(code), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  async function unpack({ layers, levels, largest, votes, state, precisions }, experts) {
    const [codes, states] = await Promise.all([inflate(votes), inflate(state)]);
    check(areNumbers(layers) && areNumbers(largest) && levels > 0 && layers.length === largest.length
      && codes.length === layers.length * experts && states.length === codes.length, "votes");
    return layers.map((layer, index) => ({
      layer,
      precisions,
      unit: largest[index] / levels, // votes of one level
      levels,
      codes: codes.subarray(index * experts, (index + 1) * experts),
      states: states.subarray(index * experts, (index + 1) * experts),
    }));
  }

  // What each position shows after a step: masked, guess, now, kept; and whether it was edited.
  function canvasAt(run, step) {
    const written = new Map();
    let stop = 0;
    for (const [index, frame] of run.frames.slice(0, step + 1).entries()) {
      stop = Math.max(stop, frame.stop);
      frame.remasked.forEach((position) => written.delete(position));
      for (const [tokens, edited] of [[frame.committed, false], [frame.edited, true]]) {
        for (const [position, id, text, confidence] of tokens) {
          const state = index === step ? "now" : "kept";
          const before = written.get(position)?.edited ?? false;
          written.set(position, { state, id, text, confidence, edited: edited || before });
        }
      }
    }
    for (const [position, id, text, confidence] of run.frames[step]?.provisional ?? []) {
      if (!written.has(position)) written.set(position, { state: "guess", id, text, confidence });
    }
    for (const token of written.values()) token.end = run.meta.eos_ids.includes(token.id);
    const masked = { state: "masked", text: "", confidence: 0 };
    return Array.from({ length: Math.max(stop, 0) }, (_, position) => written.get(position) ?? masked);
  }

  // One layer's election of at most `budget` experts; null repeats the recorded one.
  // Most votes first. Of equal votes, an expert that was elected comes first: so the recorded
  // budget gives the recorded coreset, although votes are rounded.
  function elect({ codes, states, unit }, budget) {
    const candidates = [...codes.keys()].filter((id) => codes[id] || states[id] & ELECTED);
    const order = candidates.sort(
      (a, b) => codes[b] - codes[a] || (states[b] & ELECTED) - (states[a] & ELECTED) || a - b);
    const elected = new Set(
      budget === null ? order.filter((id) => states[id] & ELECTED) : order.slice(0, budget));
    const sum = (ids) => ids.reduce((total, id) => total + codes[id], 0) * unit;
    return { order, elected, votes: sum(order), kept: sum([...elected]) };
  }

  // The election of all layers, compared with the recorded one.
  function replay(layers, budget) {
    const elections = layers.map((layer) => elect(layer, budget));
    const total = (key) => elections.reduce((sum, election) => sum + election[key], 0);
    const experts = elections.reduce((sum, { elected }) => sum + elected.size, 0);
    const recorded = layers.map(({ states }) => states.filter((state) => state & ELECTED).length);
    const dropped = elections.map(({ order, elected }, index) =>
      order.filter((id) => layers[index].states[id] & ELECTED && !elected.has(id)));
    return {
      elections,
      experts,
      dropped: dropped.reduce((sum, ids) => sum + ids.length, 0),
      recorded: recorded.reduce((sum, count) => sum + count, 0),
      lost: total("votes") ? 1 - total("kept") / total("votes") : 0,
    };
  }

  // Totals up to a step.
  function meterAt(run, step) {
    const frames = run.frames.slice(0, step + 1);
    const frame = frames.at(-1);
    if (!frame) return null;
    const sum = (key) => frames.reduce((total, each) => total + (each[key] ?? 0), 0);
    const isText = ([, id]) => !run.meta.eos_ids.includes(id);
    const tokens = frames.reduce((total, each) => total + each.committed.filter(isText).length, 0);
    return {
      bytes: frame.expert_bytes,
      vanilla: frame.expert_bytes_vanilla,
      read: sum("expert_bytes"),
      saved: sum("expert_bytes_vanilla") - sum("expert_bytes"),
      hitRate: frame.hit_rate ?? null,
      moved: sum("bytes_moved"),
      tokens,
      perSecond: frame.seconds > 0 ? tokens / frame.seconds : 0,
      forwards: frame.forward,
    };
  }

  // [kind, text] parts that turn one text into the other, word by word.
  function difference(before, after) {
    const [a, b] = [before, after].map((text) => text.match(/\s+|\w+|[^\s\w]/g) ?? []);
    if (a.length * b.length > DIFF_WORDS ** 2) return [["removed", before], ["added", after]];
    const width = b.length + 1; // longest common subsequence of the rest, by (i, j)
    const common = new Uint16Array((a.length + 1) * width);
    for (let i = a.length - 1; i >= 0; i--) {
      for (let j = b.length - 1; j >= 0; j--) {
        common[i * width + j] = a[i] === b[j]
          ? common[(i + 1) * width + j + 1] + 1
          : Math.max(common[(i + 1) * width + j], common[i * width + j + 1]);
      }
    }
    const parts = [];
    const push = (kind, word) => {
      if (parts.at(-1)?.[0] === kind) parts.at(-1)[1] += word;
      else parts.push([kind, word]);
    };
    let i = 0, j = 0;
    while (i < a.length || j < b.length) {
      if (i < a.length && j < b.length && a[i] === b[j]) push("same", a[i++], j++);
      else if (j === b.length || (i < a.length
        && common[(i + 1) * width + j] >= common[i * width + j + 1])) push("removed", a[i++]);
      else push("added", b[j++]);
    }
    return parts;
  }

  // A run as one JSON file; a second run on the same prompt lies inside.
  function toFile([run, other]) {
    const content = ({ policy, frames }) => ({ policy, frames });
    const head = { coterie_run: 1, meta: run.meta, prompt: run.prompt, ...content(run) };
    return JSON.stringify(other ? { ...head, compared: content(other) } : head);
  }

  async function fromFile(text) {
    let file;
    try {
      file = JSON.parse(text);
    } catch {
      throw new Error("this file is not JSON");
    }
    if (file?.coterie_run !== 1 || !Array.isArray(file.frames)) {
      throw new Error("this file holds no recorded run (coterie_run: 1)");
    }
    checkMeta(file.meta);
    const runs = [file, ...(file.compared ? [file.compared] : [])].map((each) => ({ ...file, ...each }));
    return Promise.all(runs.map(async ({ frames, ...head }) => {
      const run = new Run(head);
      for (const frame of frames) await run.add(frame);
      run.done = true;
      return run;
    }));
  }

  const isCount = (value) => Number.isInteger(value) && value >= 0 && value <= MAX_COUNT;
  const areNumbers = (list) => Array.isArray(list) && list.every(Number.isFinite);
  const isToken = (token) => Array.isArray(token) && isCount(token[0]) && typeof token[2] === "string"
    && token[3] >= 0 && token[3] <= 1;

  function check(isGood, part) {
    if (!isGood) throw new Error(`the ${part} of the run are damaged`);
  }

  function checkMeta(meta) {
    check(areNumbers(meta?.layers) && meta.layers.length && areNumbers(meta.eos_ids)
      && isCount(meta.experts) && meta.experts && isCount(meta.k) && meta.expert_bytes > 0, "model's numbers");
  }

  function checkFrame(frame) {
    const tokens = ["committed", "edited", "provisional"];
    check(tokens.every((key) => Array.isArray(frame?.[key]) && frame[key].every(isToken)), "tokens");
    const numbers = ["start", "seconds", "expert_bytes", "expert_bytes_vanilla"];
    check(numbers.every((key) => Number.isFinite(frame[key])) && typeof frame.text === "string"
      && isCount(frame.forward) && isCount(frame.block) && isCount(frame.stop)
      && areNumbers(frame.experts) && areNumbers(frame.remasked), "frames");
  }

  return { ELECTED, RESIDENT, HIGH, Run, canvasAt, elect, replay, meterAt, difference, toFile, fromFile };
})();
