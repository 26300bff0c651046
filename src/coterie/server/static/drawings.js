"use strict";

// Drawings: the parts of the page that are painted, from plain data and the colours of the style.
const Drawings = (() => {
  const { ELECTED, RESIDENT, HIGH } = Runs;
  const THUMB = 18; // pixels of a slider's handle: drawings above a slider share its scale
  const GUTTER = 30; // pixels left of the wall, for the numbers of layers

  // A canvas of the size that it has on the page, cleared, in CSS pixels.
  function begin(canvas, height) {
    const scale = window.devicePixelRatio || 1;
    const width = canvas.clientWidth;
    if (height) canvas.style.height = `${height}px`;
    height = height || canvas.clientHeight;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    pen.clearRect(0, 0, width, height);
    const style = getComputedStyle(canvas);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    pen.font = `11px ${style.fontFamily}`;
    return { pen, width, height, colour };
  }

  // Where a slider's handle stands at a value of 0 .. steps - 1.
  function onSlider(value, steps, width) {
    return THUMB / 2 + (steps > 1 ? value / (steps - 1) : 0) * (width - THUMB);
  }

  // The tokens of each step as bars over the scrubber; a line where a block starts.
  function track(canvas, frames, steps, positionOf, current) {
    const { pen, width, height, colour } = begin(canvas);
    const most = Math.max(1, ...frames.map((frame) => frame.committed.length));
    const isClock = steps > frames.length;
    const bar = Math.max(2, Math.min(isClock ? 7 : THUMB, (width - THUMB) / frames.length - 3));
    frames.forEach((frame, index) => {
      const x = onSlider(positionOf(frame, index), steps, width);
      const size = Math.max(2, (frame.committed.length / most) * (height - 14));
      pen.fillStyle = colour(index <= current ? "accent" : "faint");
      pen.globalAlpha = index === current ? 1 : index < current ? 0.45 : 1;
      round(pen, x - bar / 2, height - size, bar, size, 2);
      if (frame.committed.length && bar >= 12) {
        pen.globalAlpha = 1;
        pen.fillStyle = colour(index === current ? "ink" : "muted");
        pen.textAlign = "center";
        pen.fillText(frame.committed.length, x, height - size - 3);
      }
      if (index && frame.block !== frames[index - 1].block) {
        const before = onSlider(positionOf(frames[index - 1], index - 1), steps, width);
        pen.globalAlpha = 1;
        pen.fillStyle = colour("line-strong");
        pen.fillRect(Math.round((x + before) / 2), 0, 1, height);
      }
    });
  }

  // How many guesses and new tokens have which confidence.
  function histogram(canvas, cells, bins = 10) {
    const { pen, width, height, colour } = begin(canvas);
    const counts = { now: new Array(bins).fill(0), guess: new Array(bins).fill(0) };
    for (const { state, confidence } of cells) {
      if (counts[state]) counts[state][Math.min(bins - 1, Math.floor(confidence * bins))]++;
    }
    const most = Math.max(1, ...counts.now.map((count, bin) => count + counts.guess[bin]));
    const [slot, floor] = [width / bins, height - 15];
    for (let bin = 0; bin < bins; bin++) {
      let top = floor;
      for (const state of ["guess", "now"]) {
        const size = (counts[state][bin] / most) * (floor - 4);
        pen.fillStyle = colour(state === "now" ? "accent" : "guess");
        if (size) round(pen, bin * slot + 1, top - size, slot - 2, size, 1.5);
        top -= size;
      }
    }
    pen.fillStyle = colour("line-strong");
    pen.fillRect(0, floor, width, 1);
    pen.fillStyle = colour("muted");
    for (const [text, x, align] of [["0", 0, "left"], ["0.5", width / 2, "center"], ["1", width, "right"]]) {
      pen.textAlign = align;
      pen.fillText(text, x, height - 3);
    }
    return counts;
  }

  // One layer's votes, most first, over the budget's slider; the dashed line is the budget.
  function ballot(canvas, layer, election, budget) {
    const { pen, width, height, colour } = begin(canvas);
    const experts = layer.codes.length;
    const step = (width - THUMB) / Math.max(1, experts - 1);
    const most = Math.max(1, ...layer.codes);
    const floor = height - 1;
    election.order.forEach((id, rank) => {
      const size = Math.max(1.5, (layer.codes[id] / most) * (floor - 18));
      paintExpert(pen, colour, layer, election, id);
      pen.globalAlpha = 1;
      const bar = Math.max(1, step - (step > 4 ? 1 : 0.25));
      pen.fillRect(onSlider(rank, experts, width) - bar / 2, floor - size, bar, size);
    });
    pen.globalAlpha = 1;
    pen.fillStyle = colour("line-strong");
    pen.fillRect(0, floor, width, 1);
    const cut = onSlider(budget - 1, experts, width) + step / 2;
    pen.strokeStyle = colour("ink");
    pen.setLineDash([3, 3]);
    pen.beginPath();
    pen.moveTo(cut, 2);
    pen.lineTo(cut, floor);
    pen.stroke();
    pen.setLineDash([]);
    pen.fillStyle = colour("ink");
    const isRight = cut < width - 90, x = cut + (isRight ? 7 : -7);
    pen.textAlign = isRight ? "left" : "right";
    pen.fillText(`${election.elected.size} elected`, x, 11);
    const rejected = election.order.length - election.elected.size;
    pen.fillStyle = colour("muted");
    if (rejected > 0) pen.fillText(`${rejected} not read`, x, 26);
  }

  // All layers and experts: the shade is the vote, the colour whether it is read.
  function wall(canvas, layers, elections, selected) {
    const geometry = wallGeometry(canvas.clientWidth, layers.length, layers[0].codes.length);
    const { columns, cell, tall, rowHeight, gap, space } = geometry;
    const { pen, colour } = begin(canvas, layers.length * rowHeight);
    layers.forEach((layer, row) => {
      const top = row * rowHeight;
      pen.globalAlpha = 1;
      pen.textAlign = "right";
      pen.fillStyle = colour(row === selected ? "accent-ink" : "muted");
      pen.fillText(layer.layer, GUTTER - 10, top + tall);
      if (row === selected) {
        pen.fillStyle = colour("accent");
        pen.fillRect(GUTTER - 6, top, 2, rowHeight - space);
      }
      layer.codes.forEach((code, id) => {
        const x = GUTTER + (id % columns) * cell, y = top + Math.floor(id / columns) * tall;
        paintExpert(pen, colour, layer, elections[row], id);
        const isLow = layer.precisions > 1 && layer.states[id] & ELECTED && !(layer.states[id] & HIGH);
        const [wide, high] = [cell - gap, tall - gap];
        if (isLow) pen.fillRect(x, y + high / 2, wide, high / 2);
        else pen.fillRect(x, y, wide, high);
      });
    });
    return geometry;
  }

  function wallGeometry(width, layers, experts) {
    const room = width - GUTTER, least = layers > 8 ? 4.4 : Math.min(13, room / 24);
    const fitting = [...Array(experts + 1).keys()].filter(
      (count) => count && experts % count === 0 && room / count >= least);
    const most = Math.min(experts, Math.floor(room / least));
    const columns = Math.max(1, (fitting.at(-1) ?? 0) * 2 > most ? fitting.at(-1) : most);
    const cell = room / columns;
    const tall = Math.round(Math.min(15, Math.max(9, cell * 1.1)));
    const [gap, space] = layers > 8 ? [0.6, 5] : [1, 8]; // between experts, between layers
    return { columns, cell, tall, gap, space, rowHeight: Math.ceil(experts / columns) * tall + space };
  }

  // The row and the expert at a point of the wall; null beside them.
  function expertAt({ columns, cell, tall, rowHeight }, experts, x, y) {
    const row = Math.floor(y / rowHeight);
    const line = Math.floor((y - row * rowHeight) / tall);
    const column = Math.floor((x - GUTTER) / cell);
    const id = line * columns + column;
    return column < 0 || column >= columns || id >= experts ? null : { row, id };
  }

  // Colour and shade of an expert: read, fetched, dropped or gained by the slider, or not elected.
  function paintExpert(pen, colour, layer, election, id) {
    const was = layer.states[id] & ELECTED, is = election.elected.has(id);
    const share = layer.codes[id] / layer.levels;
    const least = was || is ? 0.32 : 0.14;
    pen.globalAlpha = share || was ? least + (1 - least) * Math.sqrt(share) : 1;
    if (was && !is) pen.fillStyle = colour("drop");
    else if (is && !was) pen.fillStyle = colour("gain");
    else if (is) pen.fillStyle = colour(layer.states[id] & RESIDENT ? "accent" : "fetch");
    else pen.fillStyle = colour(share ? "reject" : "empty");
  }

  // Bytes of each step, and of the unmodified model.
  function traffic(canvas, frames, current) {
    const { pen, width, height, colour } = begin(canvas);
    const most = Math.max(1, ...frames.map((frame) => frame.expert_bytes_vanilla));
    const slot = width / Math.max(frames.length, 8);
    frames.forEach((frame, index) => {
      pen.globalAlpha = index <= current ? 1 : 0.35;
      for (const [key, name] of [["expert_bytes_vanilla", "faint"], ["expert_bytes", "accent"]]) {
        const size = (frame[key] / most) * (height - 2);
        pen.fillStyle = colour(name);
        if (size) round(pen, index * slot + 1, height - size, slot - 2, size, 2);
      }
    });
    pen.globalAlpha = 1;
  }

  function round(pen, x, y, width, height, radius) {
    pen.beginPath();
    pen.roundRect(x, y, width, height, [radius, radius, 0, 0]);
    pen.fill();
  }

  return { track, histogram, ballot, wall, expertAt, traffic };
})();
