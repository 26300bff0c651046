"use strict";

// One run on the page: its story, canvas, vote and meter at a step.
class RunView {
  constructor(run, onChange) {
    Object.assign(this, { run, onChange, layer: 0, budget: null, step: -1 });
    const template = document.getElementById("run-view");
    this.element = template.content.firstElementChild.cloneNode(true);
    this.find = (selector) => this.element.querySelector(selector);
    this.element.classList.toggle("wide", run.meta.layers.length > 8);
    this.find(".policy").textContent = run.policy;
    const choice = this.find(".layer");
    run.meta.layers.forEach((layer, index) => choice.add(new Option(layer, index)));
    choice.addEventListener("change", () => this.change({ layer: Number(choice.value) }));
    const budget = this.find(".budget");
    budget.max = run.meta.experts;
    budget.addEventListener("input", () => this.change({ budget: Number(budget.value) }));
    this.find(".reset").addEventListener("click", () => {
      this.change({ budget: null });
      budget.focus();
    });
    const wall = this.find(".wall");
    wall.addEventListener("click", (event) => {
      const place = this.placeAt(event);
      if (place) this.change({ layer: place.row });
    });
    wall.addEventListener("pointermove", (event) => this.read(this.placeAt(event)));
    wall.addEventListener("pointerleave", () => this.read(null));
  }

  change(values) {
    Object.assign(this, values);
    this.onChange();
  }

  show(step) {
    this.step = step;
    const { run } = this, frame = run.frames[step];
    const cells = Runs.canvasAt(run, step);
    this.layers = run.votes.slice(0, step + 1).findLast((votes) => votes) ?? null;
    this.vote = this.layers && Runs.replay(this.layers, this.budget);
    this.showStory(frame);
    this.showTokens(frame, cells);
    this.showVote();
    this.showMeter(frame);
  }

  showStory(frame) {
    const story = this.find(".story"), { run } = this;
    if (!frame) return fill(story, "Not started yet.");
    const size = run.meta.layers.length * run.meta.expert_bytes;
    const [wanted, read] = [frame.expert_bytes_vanilla / size, frame.expert_bytes / size];
    const start = [`The ${frame.stop - frame.start} tokens of a block`, "b"];
    if (!frame.experts.length) return fill(story, start, " take this step without a vote.");
    const picked = [start, " picked ", [`${count(wanted)} different experts`, "b"], " in each layer. "];
    if (run.policy === "vanilla") {
      return fill(story, ...picked, "The unmodified model holds no election. It reads all of them: ",
        [bytes(frame.expert_bytes), "b"], ".");
    }
    return fill(story, ...picked, "They vote. The ", [`${count(read)} with most votes`, "b elected"],
      " are elected, and only these are read: ", [bytes(frame.expert_bytes), "b elected"],
      " instead of ", [bytes(frame.expert_bytes_vanilla), "b"], ".");
  }

  showTokens(frame, cells) {
    const states = (state) => cells.filter((cell) => cell.state === state).length;
    const [now, masked] = [states("now"), states("masked") + states("guess")];
    this.find(".step-note").textContent = frame
      ? `${now} written now, ${masked} masked` : "";
    const list = this.find(".tokens");
    list.replaceChildren(...shownCells(cells).map(tokenElement));
    const text = this.run.textAt(this.step);
    this.find(".tokens-text").textContent =
      `Final text: ${text || "none yet"}. Masked positions: ${masked}.`;
    const histogram = this.find(".histogram");
    const counts = Drawings.histogram(histogram, cells);
    histogram.setAttribute("aria-label", `Histogram of confidence from 0 to 1 in ten steps. `
      + `Written now: ${counts.now.join(", ")}. Guesses: ${counts.guess.join(", ")}.`);
  }

  showVote() {
    const { run, layers, vote, budget } = this;
    this.find(".vote-card").hidden = !layers;
    if (!layers) return;
    this.layer = Math.min(this.layer, layers.length - 1);
    const layer = layers[this.layer], election = vote.elections[this.layer];
    const slider = this.find(".budget"), elected = Math.max(1, election.elected.size);
    this.find(".layer").value = this.layer;
    slider.value = budget ?? elected;
    fill(this.find(".vote-note"), `Each bar is one of the ${run.meta.experts} experts of layer ${layer.layer}. `
      + "Its height is its votes: the router weights of all tokens that picked it.");
    Drawings.ballot(this.find(".ballot"), layer, election, budget ?? elected);
    this.find(".ballot").setAttribute("aria-label", `Votes of layer ${layer.layer}: `
      + `${election.order.length} experts have votes, ${election.elected.size} are elected. `
      + `Most votes: ${election.order.slice(0, 5).map((id) => `expert ${id}, ${votes(layer, id)}`).join("; ")}.`);
    const { columns } = (this.geometry = Drawings.wall(this.find(".wall"), layers, vote.elections, this.layer));
    this.find(".wall").setAttribute("aria-label", `${layers.length} layers with ${run.meta.experts} experts, `
      + `${columns} in a line. Elected in each layer: ${vote.elections.map(({ elected }) => elected.size).join(", ")}.`);
    this.showReplay(slider);
    this.showLegend(layers);
    this.read(null);
  }

  showReplay(slider) {
    const { run, vote, budget } = this, output = this.find(".replay");
    const read = vote.experts * run.meta.expert_bytes, share = percent(vote.lost);
    this.find(".reset").hidden = budget === null;
    if (budget === null) {
      fill(output, ...vote.lost > 0
        ? ["As recorded: the elected experts hold ", [percent(1 - vote.lost), "b"], " of all votes."]
        : ["As recorded: every expert with votes is read."]);
    } else {
      const change = vote.experts - vote.recorded, gained = vote.dropped + change;
      fill(output, "With ", [`${budget} experts a layer`, "b"], ": ",
        [`${plural(vote.dropped, "expert")} of ${vote.recorded} would drop`, "loss"],
        gained ? `, ${gained} would join` : "", "; ", [`${share} of the votes`, "loss"],
        ` would be lost, and ${bytes(read)} read.`);
    }
    slider.setAttribute("aria-valuetext", output.textContent);
  }

  showLegend(layers) {
    const states = layers.flatMap((layer) => [...layer.states]);
    const isFetched = (state) => state & Runs.ELECTED && !(state & Runs.RESIDENT);
    const isOffloaded = this.run.meta.offloaded || states.some(isFetched);
    const entries = [["elected", isOffloaded ? "elected, in fast memory" : "elected and read"]];
    if (isOffloaded) entries.push(["fetched", "elected, fetched"]);
    if (layers[0].precisions > 1) entries.push(["elected low", "in low precision"]);
    entries.push(["rejected", "not elected"], ["none", "no votes"]);
    if (this.budget !== null) entries.push(["dropped", "would drop"], ["gained", "would join"]);
    this.find(".wall-legend").replaceChildren(...entries.map(([name, text]) => {
      const [item, swatch] = [document.createElement("li"), document.createElement("i")];
      swatch.className = name;
      item.append(swatch, text);
      return item;
    }));
  }

  showMeter(frame) {
    const meter = Runs.meterAt(this.run, this.step), set = (selector, text) => {
      this.find(selector).textContent = text;
    };
    const most = Math.max(...this.run.frames.map((each) => each.expert_bytes_vanilla), 1);
    this.find(".now-fill").style.width = `${100 * (meter?.bytes ?? 0) / most}%`;
    this.find(".vanilla-fill").style.width = `${100 * (meter?.vanilla ?? 0) / most}%`;
    set(".bytes-now", bytes(meter?.bytes ?? 0));
    set(".bytes-vanilla", bytes(meter?.vanilla ?? 0));
    set(".saved", bytes(meter?.saved ?? 0));
    set(".hits", meter?.hitRate == null ? "all in memory" : percent(meter.hitRate));
    this.find(".hits").classList.toggle("words", meter?.hitRate == null);
    set(".speed", meter ? count(meter.perSecond) : "0");
    set(".forwards", meter?.forwards ?? 0);
    const traffic = this.find(".traffic");
    Drawings.traffic(traffic, this.run.frames, this.step);
    traffic.setAttribute("aria-label", "Bytes of experts in each step, read and of the unmodified model: "
      + this.run.frames.map((each) => `${bytes(each.expert_bytes)} of ${bytes(each.expert_bytes_vanilla)}`).join(", "));
  }

  placeAt(event) {
    if (!this.layers) return null;
    const place = Drawings.expertAt(this.geometry, this.run.meta.experts, event.offsetX, event.offsetY);
    return place && place.row < this.layers.length ? place : null;
  }

  // One line about the expert under the pointer.
  read(place) {
    const output = this.find(".readout");
    if (!place) return fill(output, "Point at an expert, or choose a layer by clicking it.");
    const layer = this.layers[place.row], state = layer.states[place.id];
    const words = [state & Runs.ELECTED ? "elected" : "not elected"];
    if (this.run.meta.offloaded) words.push(state & Runs.RESIDENT ? "in fast memory" : "not in fast memory");
    if (layer.precisions > 1) words.push(state & Runs.HIGH ? "high precision" : "low precision");
    return fill(output, `Layer ${layer.layer}, expert ${place.id}: ${votes(layer, place.id)} votes, ${words.join(", ")}.`);
  }
}

// After the end of the text, positions hold nothing to read: show only one end mark.
function shownCells(cells) {
  const end = cells.findIndex((cell) => cell.end);
  if (end < 0 || cells.some(({ state }) => state === "masked" || state === "guess")) return cells;
  return cells.slice(0, end + 1);
}

function tokenElement({ state, text, confidence, edited, end }) {
  const token = document.createElement("span");
  token.className = `token ${state}${edited ? " edited" : ""}${end ? " end" : ""}`;
  token.style.setProperty("--c", confidence);
  token.textContent = end ? "∎" : state === "masked" ? "" : text.replace(/\n/g, "↵\n");
  if (state !== "masked") token.title = `${JSON.stringify(text)}: confidence ${confidence}`;
  return token;
}

// Text, and [text, class] pairs; "b" is strong.
function fill(element, ...parts) {
  element.replaceChildren(...parts.map((part) => {
    if (typeof part === "string") return part;
    const [tag, ...classes] = part[1].split(" ");
    const child = document.createElement(tag === "b" ? "b" : "span");
    child.className = (tag === "b" ? classes : [tag, ...classes]).join(" ");
    child.textContent = part[0];
    return child;
  }));
}

function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  const power = value >= 1 ? Math.min(units.length - 1, Math.floor(Math.log10(value) / 3)) : 0;
  const scaled = value / 1000 ** power;
  return `${power && scaled < 100 ? scaled.toFixed(1) : Math.round(scaled)}\u00a0${units[power]}`;
}

const count = (value) => (value < 9.95 && value % 1 ? value.toFixed(1) : String(Math.round(value)));
const percent = (share) => `${(100 * share).toFixed(share < 0.0995 && share > 0 ? 1 : 0)}\u00a0%`;
const plural = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
const votes = (layer, id) => (layer.codes[id] * layer.unit).toFixed(1);
