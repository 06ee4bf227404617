/* The report's behaviour: data comes from script files (a page opened from a folder may not fetch), the grid keeps only
   what is in view, and every value from a prompt or a model enters the page as text, never as markup. */
"use strict";

const vidgenReport = (() => {
  const meta = JSON.parse(document.getElementById("meta").textContent);
  const at = Object.fromEntries(meta.columns.map((name, index) => [name, index]));
  const byId = (id) => document.getElementById(id);
  const grid = byId("grid"), viewer = byId("viewer");
  const number = new Intl.NumberFormat("en");
  const rows = [];
  const details = new Map();
  const state = { words: [], status: "", failure: -1, sort: "plan", size: "m", playing: false };
  let view = [];
  let shape = { columns: 1, width: 200, height: 200, thumb: 150 };
  const cells = new Map();
  let open = -1, focused = 0, loaded = 0, settled = 0;

  function make(tag, name, text) {
    const node = document.createElement(tag);
    if (name) node.className = name;
    if (text !== undefined) {
      node.textContent = text;
      node.dir = "auto";  // written from right to left where it is, and never turning what stands beside it
    }
    return node;
  }
  const script = (name) => new Promise((resolve, reject) => {
    const node = make("script");
    node.src = `${name}?${meta.stamp}`;
    node.onload = () => { node.remove(); resolve(); };
    node.onerror = () => reject(new Error(`${name} cannot be read`));
    document.head.append(node);
  });
  const link = (path) => "../" + path.split("/").map(encodeURIComponent).join("/");
  const kind = (path) => (/\.(mp4|webm)$/.test(path) ? "video" : path.endsWith(".gif") ? "image" : "none");
  const poster = (path) => "posters/" + encodeURIComponent(path.split("/").pop().replace(/\.[^.]+$/, ".jpg"));
  const file = (folder, chunk) => `${folder}/${String(chunk).padStart(5, "0")}.js`;

  /* ---- data ---- */
  function receive(chunk, list) {
    list.forEach((row, index) => { rows[chunk * meta.chunk + index] = row; });
    loaded += list.length;
  }
  async function load() {
    const waiting = [...Array(meta.chunks).keys()];
    const fetchNext = async () => {
      while (waiting.length) {
        await script(file("rows", waiting.shift())).catch((error) => console.error(error));
        refresh();
      }
    };
    await Promise.all([fetchNext(), fetchNext(), fetchNext()]);
    const wanted = /^#row-(\d+)$/.exec(location.hash);
    if (wanted && rows[+wanted[1]]) show(view.indexOf(+wanted[1]));
  }
  function detail(index) {
    const chunk = Math.floor(index / meta.chunk);
    if (!details.has(chunk)) details.set(chunk, { list: null, ready: script(file("more", chunk)) });
    const entry = details.get(chunk);
    return entry.ready.then(() => entry.list[index % meta.chunk]);
  }

  /* ---- filter and order ---- */
  function matches(row) {
    if (state.status && meta.statuses[row[at.status]] !== state.status) return false;
    if (state.failure >= 0 && row[at.failure] !== state.failure) return false;
    if (!state.words.length) return true;
    row.text ??= [row[at.prompt], row[at.row_id], row[at.item_id], row[at.seed]].join("\n").toLowerCase();
    return state.words.every((word) => row.text.includes(word));
  }
  function refresh() {
    view = [];
    rows.forEach((row, index) => { if (matches(row)) view.push(index); });
    const column = { newest: at.created_at, slowest: at.seconds }[state.sort];
    if (column !== undefined) view.sort((a, b) => rows[b][column] - rows[a][column] || a - b);
    const all = view.length === loaded;
    let text = all ? `${number.format(loaded)} shown` : `${number.format(view.length)} of ${number.format(loaded)}`;
    if (loaded < meta.rows) text += ", loading";
    else if (meta.rows < meta.total) text += ` (the run has ${number.format(meta.total)})`;
    byId("count").textContent = text;
    byId("empty").hidden = view.length > 0 || loaded < meta.rows;
    clear();
    layout();
  }
  function refilter() {
    for (const chip of byId("chips").children) chip.setAttribute("aria-pressed", chip.dataset.status === state.status);
    const only = byId("only");
    only.hidden = state.failure < 0;
    if (state.failure >= 0) only.textContent = `× ${meta.failures[state.failure] ?? "one kind of failure"}`;
    const top = grid.getBoundingClientRect().top + scrollY - byId("bar").offsetHeight - 14;
    if (scrollY > top) scrollTo(0, top);
    focused = 0;
    refresh();
  }

  /* ---- the grid: only what is in view is in the page ---- */
  function layout() {
    const total = grid.clientWidth, gap = state.size === "s" ? 6 : 10;
    const wish = { s: 118, m: 196, l: 320 }[state.size];
    const least = total < 560 ? { s: 3, m: 2, l: 1 }[state.size] : 1;
    const columns = Math.max(least, Math.floor((total + gap) / (wish + gap)));
    const width = (total - gap * (columns - 1)) / columns;
    const thumb = Math.round(width * Math.min(1.4, Math.max(0.4, meta.aspect)));
    shape = { columns, width, gap, thumb, height: thumb + (state.size === "s" ? 26 : 55) };
    grid.classList.toggle("small", state.size === "s");
    const lines = Math.ceil(view.length / columns);
    grid.style.height = `${Math.max(0, lines * (shape.height + gap) - gap)}px`;
    draw();
  }
  function draw() {
    const step = shape.height + shape.gap, top = grid.getBoundingClientRect().top;
    const first = Math.max(0, Math.floor((-top - 400) / step)) * shape.columns;
    const last = Math.min(view.length, (Math.ceil((innerHeight - top + 400) / step) + 1) * shape.columns);
    for (const [place, node] of cells) {
      if (place < first || place >= last) { stop(node); node.remove(); cells.delete(place); }
    }
    const fresh = document.createDocumentFragment();
    for (let place = first; place < last; place++) {
      let node = cells.get(place);
      if (!node) {
        node = cell(place);
        cells.set(place, node);
        fresh.append(node);
      }
      const x = (place % shape.columns) * (shape.width + shape.gap), y = Math.floor(place / shape.columns) * step;
      node.style.cssText = `width:${shape.width}px;height:${shape.height}px;transform:translate(${x}px,${y}px)`;
      node.firstChild.style.height = `${shape.thumb}px`;
    }
    grid.append(fresh);
    clearTimeout(settled);
    settled = setTimeout(settle, 120);
    if (state.playing) for (const node of cells.values()) inView(node) ? play(node) : stop(node);
  }
  function settle() {
    for (const node of cells.values()) {
      const thumb = node.firstChild;
      if (!thumb.late || !inView(node)) continue;
      thumb.late();
      thumb.late = null;
    }
  }
  function clear() {
    for (const node of cells.values()) { stop(node); node.remove(); }
    cells.clear();
  }
  function inView(node) {
    const box = node.getBoundingClientRect();
    return box.bottom > 0 && box.top < innerHeight;
  }
  function cell(place) {
    const row = rows[view[place]], status = meta.statuses[row[at.status]];
    const node = make("button", `cell ${status}`);
    node.type = "button";
    node.place = place;
    node.tabIndex = place === focused ? 0 : -1;
    node.setAttribute("aria-label", `${row[at.prompt] || "no prompt"}, ${status}`);
    node.append(picture(row, status));
    const caption = make("span", "caption"), foot = make("span", "foot", footnote(row));
    caption.append(make("span", "prompt", row[at.prompt] || "(no prompt)"), foot);
    node.append(caption);
    return node;
  }
  function footnote(row) {
    const parts = row[at.seed] === null ? [] : [`seed ${row[at.seed]}`];
    if (row[at.width]) parts.push(`${row[at.width]}×${row[at.height]}×${row[at.frames]}`);
    return parts.join(" · ") || String(row[at.row_id] ?? "");
  }
  function picture(row, status) {
    const thumb = make("span", row[at.width] && row[at.width] <= 160 ? "thumb tiny" : "thumb"), video = row[at.video];
    const note = (title, text) => {
      const box = make("p");
      box.append(make("b", "", title), make("bdi", "", text));
      thumb.append(box);
    };
    if (status !== "done") {
      note(status, row[at.error] || "");
      return thumb;
    }
    const moving = () => {
      if (kind(video) === "none") return note("no preview", video);
      const media = make(kind(video) === "video" ? "video" : "img");
      media.onerror = () => { media.remove(); note("cannot be read", video); };
      if (kind(video) === "video") Object.assign(media, { muted: true, loop: true, playsInline: true, preload: "metadata" });
      media.src = link(video) + (kind(video) === "video" ? `#t=${row[at.frames] / row[at.fps] / 2}` : "");
      thumb.prepend(media);
    };
    if (row[at.poster]) {
      const image = make("img");
      image.alt = "";
      image.decoding = "async";
      image.onerror = () => { image.remove(); moving(); };
      image.src = poster(video);
      thumb.append(image);
    } else thumb.late = moving;  // a video each is dear while the page flies by
    return thumb;
  }
  function play(node) {
    const row = rows[view[node.place]], thumb = node.firstChild;
    if (!row[at.video] || meta.statuses[row[at.status]] !== "done" || thumb.querySelector(".over")) return;
    const plain = thumb.querySelector("video");
    if (plain) { plain.play().catch(() => {}); return; }
    if (kind(row[at.video]) === "none") return;
    const over = make(kind(row[at.video]) === "video" ? "video" : "img", "over");
    if (over.tagName === "VIDEO") {
      Object.assign(over, { muted: true, loop: true, playsInline: true, preload: "auto" });
      over.onplaying = () => over.classList.add("on");
    }
    over.onerror = () => over.remove();
    over.src = link(row[at.video]);
    thumb.append(over);
    if (over.tagName === "VIDEO") over.play().catch(() => {});
  }
  function stop(node) {
    const over = node.querySelector(".over"), plain = node.querySelector("video:not(.over)");
    if (over) { over.removeAttribute("src"); over.load?.(); over.remove(); }
    if (plain) plain.pause();
  }
  function focus(place) {
    if (place < 0 || place >= view.length) return;
    const before = cells.get(focused);
    if (before) before.tabIndex = -1;
    focused = place;
    const step = shape.height + shape.gap, y = grid.getBoundingClientRect().top + Math.floor(place / shape.columns) * step;
    const ceiling = byId("bar").offsetHeight + 10;
    if (y < ceiling) scrollBy(0, y - ceiling);
    else if (y + shape.height > innerHeight - 10) scrollBy(0, y + shape.height - innerHeight + 10);
    draw();
    const node = cells.get(place);
    if (node) { node.tabIndex = 0; node.focus({ preventScroll: true }); }
  }

  /* ---- one video, large ---- */
  const GROUPS = [
    ["Request", ["seed", "negative_prompt", "size", "fps", "num_inference_steps", "guidance_scale", "sampler", "params"]],
    ["Time", ["encode_s", "denoise_s", "decode_s", "write_s", "created_at"]],
    ["File", ["video", "bytes", "sha256"]],
    ["Model", ["family", "task", "checkpoint", "checkpoint_hash", "loras", "dtype", "tiling", "spec_hash"]],
    ["Run", ["item_id", "row_id", "sample", "attempt", "generation", "batch", "context", "gpu", "node", "vidgen_version", "origin_file", "origin_row"]],
  ];
  const LABELS = { num_inference_steps: "steps", guidance_scale: "guidance", negative_prompt: "negative", encode_s: "encode", denoise_s: "denoise", decode_s: "decode", write_s: "write", created_at: "made at", checkpoint_hash: "weights hash", spec_hash: "spec hash", item_id: "item", row_id: "row", vidgen_version: "vidgen", origin_file: "from file", origin_row: "from row" };
  const MONO = new Set(["video", "sha256", "checkpoint_hash", "spec_hash", "item_id", "params", "origin_file", "checkpoint"]);
  const HIDDEN = new Set(["prompt", "status", "error", "error_class", "width", "height", "num_frames"]);

  function written(name, value, all) {
    if (name === "size") return all.width ? `${all.width} × ${all.height}, ${all.num_frames} frames` : "";
    if (value === null || value === undefined || value === "" || value === "[]" || value === "{}") return "";
    if (name.endsWith("_s") && typeof value === "number") return `${value.toFixed(value < 10 ? 2 : 1)} s`;
    if (name === "created_at" && typeof value === "number") return value ? new Date(value * 1000).toLocaleString() : "";
    if (name === "bytes") return `${number.format(value)} bytes`;
    return typeof value === "object" ? JSON.stringify(value) : String(value);
  }
  function table(about, title, names, all) {
    const list = make("dl");
    for (const name of names) {
      const text = written(name, all[name], all);
      if (text) list.append(make("dt", "", LABELS[name] ?? name), make("dd", MONO.has(name) ? "mono" : "", text));
    }
    if (list.children.length) about.append(make("h3", "", title), list);
  }
  function describe(row, all) {
    const about = byId("about"), status = meta.statuses[row[at.status]];
    about.className = `about ${status}`;
    about.replaceChildren(make("p", "prompt", row[at.prompt] || "(no prompt)"));
    about.append(make("p", "state", [status, all?.error_class].filter(Boolean).join(" · ")));
    if (all?.error) about.append(make("p", "error", all.error));
    const actions = make("div", "actions");
    const copier = (label, text) => {
      const button = make("button", "", label);
      button.type = "button";
      button.onclick = () => copy(text).then((done) => {
        button.textContent = done ? "copied" : "not allowed here";
        setTimeout(() => { button.textContent = label; }, 1200);
      });
      actions.append(button);
    };
    copier("copy prompt", row[at.prompt] || "");
    if (row[at.seed] !== null) copier("copy seed", String(row[at.seed]));
    if (all) copier("copy all as JSON", JSON.stringify(all, null, 1));
    if (status === "failed" || status === "quarantined") {
      copier("copy retry command", `${meta.retry} "item_id = '${row[at.item_id]}'"`);
    }
    if (row[at.video]) {
      const open = make("a", "", "open file");
      Object.assign(open, { href: link(row[at.video]), target: "_blank" });
      actions.append(open);
    }
    about.append(actions);
    if (!all) return;
    for (const [title, names] of GROUPS) table(about, title, names, all);
    const known = new Set(GROUPS.flatMap(([, names]) => names));
    table(about, "Input columns", Object.keys(all).filter((name) => !known.has(name) && !HIDDEN.has(name)), all);
  }
  async function copy(text) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch (refused) {
      const area = make("textarea");
      area.value = text;
      viewer.append(area);
      area.select();
      const done = document.execCommand("copy");
      area.remove();
      return done;
    }
  }
  function show(place) {
    if (place < 0 || place >= view.length) return;
    open = place;
    const index = view[place], row = rows[index], status = meta.statuses[row[at.status]], video = row[at.video];
    const stage = byId("stage");
    let media;
    if (status === "done" && kind(video) !== "none") {
      media = make(kind(video) === "video" ? "video" : "img", row[at.width] <= 160 ? "tiny" : "");
      if (media.tagName === "VIDEO") Object.assign(media, { controls: true, loop: true, muted: true, autoplay: true, playsInline: true });
      media.onerror = () => stage.replaceChildren(make("p", "note failed", `cannot be read: ${video}`));
      media.src = link(video);
    } else if (status === "done") {
      media = make("img", row[at.width] <= 160 ? "tiny" : "");
      media.src = poster(video);
    } else media = make("p", `note ${status}`, row[at.error] || status);
    if (media.className === "tiny") {  // beyond ten times its size there is nothing more to see
      media.style.maxWidth = `${row[at.width] * 10}px`;
      media.style.maxHeight = `${row[at.height] * 10}px`;
    }
    stage.replaceChildren(media);
    byId("place").textContent = `${number.format(place + 1)} of ${number.format(view.length)}`;
    byId("previous").disabled = place === 0;
    byId("next").disabled = place === view.length - 1;
    describe(row, null);
    detail(index).then((all) => { if (open === place) describe(row, all); }, (error) => console.error(error));
    if (!viewer.open) viewer.showModal();
    history.replaceState(null, "", `#row-${index}`);
  }
  function hide() {
    byId("stage").replaceChildren();
    history.replaceState(null, "", location.pathname + location.search);
    const place = open;
    open = -1;
    focus(place);
  }

  /* ---- hands ---- */
  let due = false;
  const soon = () => { if (!due) { due = true; requestAnimationFrame(() => { due = false; draw(); }); } };
  addEventListener("scroll", soon, { passive: true });
  new ResizeObserver(() => layout()).observe(grid);
  grid.addEventListener("click", (event) => { const node = event.target.closest(".cell"); if (node) show(node.place); });
  grid.addEventListener("pointerover", (event) => {
    const node = event.target.closest(".cell");
    if (node && event.pointerType === "mouse" && !node.contains(event.relatedTarget)) play(node);
  });
  grid.addEventListener("pointerout", (event) => {
    const node = event.target.closest(".cell");
    if (node && !state.playing && !node.contains(event.relatedTarget)) stop(node);
  });
  let typing = 0;
  byId("find").addEventListener("input", (event) => {
    clearTimeout(typing);
    typing = setTimeout(() => { state.words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean); refilter(); }, 90);
  });
  byId("chips").addEventListener("click", (event) => {
    const chip = event.target.closest("button");
    if (chip) { state.status = chip.dataset.status; refilter(); }
  });
  byId("only").addEventListener("click", () => { state.failure = -1; refilter(); });
  byId("sort").addEventListener("change", (event) => { state.sort = event.target.value; refilter(); });
  byId("sizes").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    state.size = button.dataset.size;
    for (const other of byId("sizes").children) other.setAttribute("aria-pressed", other === button);
    clear();
    layout();
  });
  function toggle() {
    state.playing = !state.playing;
    byId("play").setAttribute("aria-pressed", state.playing);
    if (state.playing) draw();
    else for (const node of cells.values()) stop(node);
  }
  byId("play").addEventListener("click", toggle);
  byId("reset").addEventListener("click", () => {
    Object.assign(state, { words: [], status: "", failure: -1 });
    byId("find").value = "";
    refilter();
  });
  for (const button of document.querySelectorAll("[data-failure]")) {
    button.addEventListener("click", () => {
      Object.assign(state, { failure: +button.dataset.failure, status: "" });
      refilter();
      byId("bar").scrollIntoView({ block: "start" });
    });
  }
  byId("previous").addEventListener("click", () => show(open - 1));
  byId("next").addEventListener("click", () => show(open + 1));
  byId("close").addEventListener("click", () => viewer.close());
  byId("stage").addEventListener("click", (event) => { if (event.target === byId("stage")) viewer.close(); });
  viewer.addEventListener("close", hide);
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (viewer.open) return turn(event);
    if (event.target.matches("input, select")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -shape.columns, ArrowDown: shape.columns };
    if (event.key === "/") { event.preventDefault(); byId("find").focus(); }
    else if (event.key === "p") toggle();
    else if (event.key in moves && document.activeElement?.classList.contains("cell")) {
      event.preventDefault();
      focus(focused + moves[event.key]);
    }
  });
  function turn(event) {
    const video = byId("stage").querySelector("video"), fps = open >= 0 ? rows[view[open]][at.fps] || 8 : 8;
    if (event.key === "ArrowLeft") show(open - 1);
    else if (event.key === "ArrowRight") show(open + 1);
    else if (event.key === " " && video && !event.target.matches("button, a")) video.paused ? video.play() : video.pause();
    else if ((event.key === "," || event.key === ".") && video) {
      video.pause();
      const length = video.duration || 1, to = video.currentTime + (event.key === "." ? 1 : -1) / fps;
      video.currentTime = (to + length) % length;
    } else return;
    event.preventDefault();
  }

  addEventListener("DOMContentLoaded", load);
  return { rows: receive, more: (chunk, list) => { details.get(chunk).list = list; } };
})();
