// The page: what is listed, what is open, and the keys. The address's hash names the open clip.

import { el, get, grouped } from "./dom.js";
import { List } from "./list.js";
import { Player } from "./player.js";
import { Plot } from "./plots.js";

const $ = (id) => document.getElementById(id);
const POLL_MS = 700;
const KEYS = [["space", "play"], ["← →", "frame"], ["j k", "clip"], ["home end", "first, last"], ["/", "search"], ["g", "go to"]];
const TABS = {
  clips: { source: "samples", draw: drawClip, pick: (row) => show(row.key, player?.isPlaying) },
  refused: { source: "failures", draw: drawRefused, pick: showRefused },
};

const list = new List($("list"));
let dataset = { reasons: [], version: "" };
let tab = "clips";
let player = null;
let open = { key: "", request: new AbortController() };

const chip = (text, kind = "") => text && el("span", { className: `chip ${kind}` }, text);
const hashKey = () => decodeURIComponent(location.hash.slice(1));

function drawClip(row) {
  return [
    el("p", { className: "title" }, row.text || row.source_id),
    el("p", { className: "under" },
      el("span", { className: "mono" }, row.key),
      chip(row.label), row.split !== "train" && chip(row.split, "split"), row.unverified && chip("unverified", "warn"),
      el("span", { className: "push" }, `${grouped(row.num_frames)} frames · ${row.duration}`)),
  ];
}

function drawRefused(row) {
  return [
    el("p", { className: "title" }, row.source_id || row.path),
    el("p", { className: "under" }, chip(row.reason, "warn"), el("span", {}, row.message)),
  ];
}

async function refresh(keep = false) {
  const fields = [...$("filters").elements].filter((field) => field.name && !field.closest("[hidden]"));
  const query = Object.fromEntries(fields.map((field) => [field.name, field.type === "checkbox" ? Number(field.checked) : field.value]));
  await list.load({ ...TABS[tab], query, keep, around: open.key });
  $("total").textContent = `${grouped(list.total)} ${tab}`;
}

function choose(name, all, choices) {
  const select = $("filters").elements[name];
  const { value } = select;
  const options = choices.filter((choice) => choice.value).map((choice) => el("option", { value: choice.value }, `${choice.shown} (${grouped(choice.count)})`));
  select.replaceChildren(el("option", { value: "" }, all), ...options);
  select.value = value;
  if (select.selectedIndex < 0) select.value = "";
}

// Again and again until every record was read: counts, choices and the list grow meanwhile.
async function poll() {
  dataset = await get("dataset");
  const { num_read: read, num_samples: all, num_problems: problems, choices } = dataset;
  document.title = `${dataset.name} · foreframe view`;
  $("name").textContent = dataset.name;
  $("name").title = dataset.url;
  const facts = [`layout ${dataset.layout}`, `${grouped(dataset.num_frames)} frames`, dataset.size, `version ${dataset.version.slice(0, 12)}`];
  $("facts").replaceChildren(...facts.map((fact) => el("li", {}, fact)));
  $("tab-clips").lastElementChild.textContent = grouped(all);
  $("tab-refused").lastElementChild.textContent = grouped(dataset.num_failures);
  for (const [name, all] of [["corpus", "All corpora"], ["label", "All labels"], ["split", "All splits"]]) choose(name, all, choices[name]);
  choose("reason", "All reasons", dataset.reasons);
  $("progress").hidden = read === all;
  $("progress").value = read / Math.max(all, 1);
  const broken = problems ? `${grouped(problems)} records cannot be read` : "";
  $("progress-text").textContent = read < all ? `reading ${grouped(read)} of ${grouped(all)}` : broken;
  $("reading").title = dataset.problems.join("\n");
  $("reading").classList.toggle("warn", problems > 0);
  await refresh(true);
  if (read < all) setTimeout(() => poll().catch(() => {}), POLL_MS);
}

function close(key = "") {
  open.request.abort();
  open = { key, request: new AbortController() };
  player?.close();
  player = null;
}

function say(title, text) {
  $("detail").replaceChildren(el("div", { className: "empty" }, el("h2", {}, title), el("p", {}, text)));
}

// Open a clip by key or source id. One that is not read yet is asked for again until it is.
async function show(name, autoplay = false) {
  close(name);
  const { signal } = open.request;
  try {
    const sample = await get("sample", { key: name }, signal);
    open.key = sample.key;
    history.replaceState(null, "", `#${encodeURIComponent(sample.key)}`);
    const plots = drawSample(sample);
    if (autoplay) player.play();
    const series = await get("arrays", { key: sample.key }, signal);
    const seek = (frame) => player.step(frame - player.frame);
    plots.push(...series.map((one) => new Plot(one, sample.num_frames - 1, seek)));
    plots.forEach((plot) => plot.follow(player.frame));
    $("plots").replaceChildren(...plots.map((plot) => plot.node));
  } catch (error) {
    if (signal.aborted) return;
    if (player) $("plots").append(el("p", { className: "notice" }, error.message));
    else say(error.status === 503 ? "Still reading" : "Nothing to show", error.message);
    if (error.status === 503) setTimeout(() => signal.aborted || show(name, autoplay), POLL_MS);
  }
}

function drawSample(sample) {
  const plots = [];
  player = new Player(sample, dataset.version.slice(0, 12), {
    onFrame: (frame) => plots.forEach((plot) => plot.follow(frame)),
    move: (step) => tab === "clips" && list.move(step),
  });
  const facts = [sample.source_id, sample.label, sample.split, `${grouped(sample.num_frames)} frames at ${Number(sample.fps.toFixed(3))} Hz`, sample.duration];
  $("detail").replaceChildren(
    heading(sample.text || sample.source_id, el("span", { className: "mono" }, sample.key), ...facts.map((fact) => fact && el("span", {}, fact))),
    player.node,
    el("div", { id: "plots" }),
    el("div", { className: "tables" },
      table("Clip", [["caption", sample.text || "–"], ["source id", sample.source_id], ["corpus", sample.corpus], ["span", sample.span]]),
      table("Metadata", sample.metadata),
      ...sample.cameras.map((camera) => table(`Camera ${camera.name}`, [
        ["pictures", `${camera.num_frames} of ${camera.width} × ${camera.height}`], ["length", camera.length], ...camera.facts]))),
    el("p", { className: "keys" }, ...KEYS.flatMap(([key, what]) => [el("kbd", {}, key), el("span", {}, what)])));
  $("detail").scrollTop = 0;
  return plots;
}

function heading(title, ...facts) {
  return el("div", { className: "heading" }, el("h2", {}, title), el("p", { className: "quiet" }, ...facts));
}

function table(title, rows) {
  const lines = rows.flatMap(([name, text]) => [el("dt", {}, name), el("dd", {}, text)]);
  return rows.length > 0 && el("section", {}, el("h3", {}, title), el("dl", {}, ...lines));
}

function showRefused(row) {
  close();
  history.replaceState(null, "", location.pathname);
  const { words } = dataset.reasons.find(({ value }) => value === row.reason);
  const lines = ["source_id", "path", "stage", "key", "sha256"].map((name) => [name.replace("_", " "), row[name] || "–"]);
  $("detail").replaceChildren(
    heading(row.source_id || row.path, chip(row.reason, "warn"), el("span", {}, words)),
    el("pre", { className: "message" }, row.message),
    el("div", { className: "tables" }, table("Source", lines)));
}

async function turnTo(name) {
  tab = name;
  for (const other of Object.keys(TABS)) {
    $(`tab-${other}`).ariaSelected = String(other === name);
    document.querySelectorAll(`[data-tab=${other}]`).forEach((node) => (node.hidden = other !== name));
  }
  await refresh();
}

async function go(name) {
  if (!name || name === open.key) return;
  await show(name);
  await turnTo("clips");
}

const ACTIONS = {
  " ": () => player?.toggle(),
  ArrowLeft: () => player?.step(-1),
  ArrowRight: () => player?.step(1),
  Home: () => player?.step(-Infinity),
  End: () => player?.step(Infinity),
  j: () => list.move(1),
  k: () => list.move(-1),
  "/": () => $("filters").elements.text.select(),
  g: () => $("jump-name").select(),
};

function onKey(event) {
  const isTyping = event.target.matches("input:not([type=range], [type=checkbox]), select");
  if (event.key === "Escape") event.target.blur();
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(ACTIONS, event.key)) return;
  event.preventDefault();
  ACTIONS[event.key]();
}

async function main() {
  let timer = 0;
  $("filters").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(refresh, 150);
  });
  document.addEventListener("submit", (event) => {
    event.preventDefault();
    document.activeElement.blur();
  });
  $("jump").addEventListener("submit", () => {
    go($("jump-name").value.trim());
    $("jump").reset();
  });
  $("filters").addEventListener("change", (event) => event.target.blur());  // so that j and k work on what was filtered
  for (const name of Object.keys(TABS)) $(`tab-${name}`).addEventListener("click", () => turnTo(name));
  window.addEventListener("hashchange", () => go(hashKey()));
  document.addEventListener("keydown", onKey);
  await poll();
  if (hashKey()) await go(hashKey());
  else if (list.total) await list.move(1);
  else say("Nothing to show yet", "Choose a clip on the left when it is read, or look at what was refused.");
}

main().catch((error) => say("The server does not answer", error.message));
