"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const CHUNK = 400;
const LEGENDS = {
  mask: [["trained", "trained on"], ["sampled", "sampled, not trained on"], ["control", "control token"]],
  logprob: [["l1", "likely"], ["l3", ""], ["l5", "e⁻⁵ or less"]],
  advantage: [["n5", "worse than its group"], ["p5", "better"]],
  mismatch: [["m1", "|policy − engine| small"], ["m5", "1 nat or more"]],
};

function el(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}
const number = (value) => (value === null || value === undefined ? "–" : String(Math.round(value * 1e4) / 1e4));
const level = (value) => Math.max(0, Math.min(5, Math.ceil(value * 5)));
const walk = (agent) => [agent, ...agent.turns.flatMap((turn) => turn.children.flatMap(walk))];
const picture = (name) => {
  const image = el("img");
  image.src = data.pictures[name];
  image.alt = "what the model saw";
  return image;
};

function colourOf(mode, agent, scale, index, inTurn) {
  const trained = agent.mask[index] === 1 && agent.trainable;
  if (mode === "mask") return trained ? "trained" : inTurn ? "sampled" : "";
  if (!inTurn) return "";
  if (mode === "logprob") return agent.logprobs[index] === null ? "broken" : `l${level(-agent.logprobs[index] / 5)}`;
  if (mode === "advantage") {
    if (!trained || scale.advantage === null) return "";
    return (scale.advantage < 0 ? "n" : "p") + level(Math.abs(scale.advantage) / scale.most);
  }
  const policy = agent.policy[index];
  return policy === undefined || policy === null ? "" : `m${level(Math.abs(policy - agent.logprobs[index]))}`;
}

function token(agent, scale, index, turn) {
  const id = agent.tokens[index];
  const node = el("span", colourOf(colour.value, agent, scale, index, turn !== null), data.pieces[id]);
  if (id >= data.base) node.classList.add("control");
  const facts = [`token ${index}`, `id ${id}`, `mask ${agent.mask[index]}`];
  if (turn !== null) facts.push(`log-probability ${number(agent.logprobs[index])}`, `weights ${agent.turns[turn].version}`);
  if (agent.policy.length) facts.push(`trainer's log-probability ${number(agent.policy[index])}`);
  node.title = facts.join("\n");
  return node;
}

/** Tokens [begin, end) into a box, a run of placeholders as the picture that it stands for. */
function tokens(box, agent, scale, begin, end, turn, media) {
  let chunk = el("div", "tokens");
  box.append(chunk);
  for (let index = begin, count = 0; index < end; index++, count++) {
    if (count === CHUNK) {
      chunk = el("div", "tokens");
      box.append(chunk);
      count = 0;
    }
    if (agent.tokens[index] !== data.pad) {
      chunk.append(token(agent, scale, index, turn));
      continue;
    }
    let last = index;
    while (last + 1 < end && agent.tokens[last + 1] === data.pad) last++;
    const frames = agent.media[media.next++] || [];
    chunk.append(el("figure", "", ...frames.map(picture), el("figcaption", "", `${last - index + 1} media tokens`)));
    index = last;
  }
}

function turnHead(turn, index) {
  const [started, generated, ended] = turn.times;
  const words = [`turn ${index}`, `${turn.length} tokens`, `weights ${turn.version}`];
  words.push(`model ${number(generated - started)} s`, `tools ${number(ended - generated)} s`);
  return el("h4", "", words.join(" · "));
}

function agentBody(agent, scale) {
  const box = el("div", "agent");
  if (agent.broke) box.append(el("p", "alert", `The prefix broke: ${agent.broke}`));
  if (agent.error) box.append(el("p", "alert", agent.error));
  for (const message of agent.messages) {
    const parts = message.parts.map((part) => (typeof part === "string" ? el("p", "said", part) : el("figure", "", ...part.map(picture))));
    box.append(el("h4", "", message.role), ...parts);
  }
  const media = { next: 0 };
  let at = 0;
  agent.turns.forEach((turn, index) => {
    if (agent.tokens.length) {
      tokens(box, agent, scale, at, turn.begin, null, media);
      box.append(turnHead(turn, index));
      tokens(box, agent, scale, turn.begin, turn.begin + turn.length, index, media);
      at = Math.max(at, turn.begin + turn.length);
    }
    for (const child of turn.children) box.append(agentBox(child, scale, child.broke !== ""));
  });
  tokens(box, agent, scale, at, agent.tokens.length, null, media);
  return box;
}

/** Filled when it is opened, so that a large file opens at once. */
function agentBox(agent, scale, open) {
  const words = [agent.role, agent.status, `${agent.turns.length} turns`, `${agent.tokens.length} tokens`];
  if (agent.trainable) words.push("trainable");
  if (agent.broke) words.push("broken prefix");
  const box = el("details", "", el("summary", "", words.join(" · "), el("small", "", agent.answer.slice(0, 160))));
  const fill = () => {
    if (box.open && box.childElementCount === 1) box.append(agentBody(agent, scale));
  };
  box.addEventListener("toggle", fill);
  box.open = open;
  if (open) fill();
  return box;
}

let shown = null;
function show(group, episode, button) {
  shown = [group, episode, button];
  for (const other of document.querySelectorAll("[aria-current]")) other.removeAttribute("aria-current");
  button.setAttribute("aria-current", "true");
  const most = Math.max(1e-9, ...group.episodes.map((one) => Math.abs(one.advantage ?? 0)));
  const scale = { advantage: episode.advantage, most };
  const judged = episode.agent;
  const names = [...new Set([...Object.keys(judged.signals), ...Object.keys(judged.reasons)])];
  const rows = names.map((name) =>
    el("tr", "", el("th", "", name), el("td", "", number(judged.signals[name])), el("td", "", number(episode.weights[name])),
      el("td", "reason", judged.reasons[name] || "")));
  const head = el("tr", "", ...["signal", "value", "weight", "reason"].map((word) => el("th", "", word)));
  document.getElementById("episode").replaceChildren(
    el("h2", "", `${group.name}, seed ${episode.seed}`),
    el("p", "", `reward ${number(episode.reward)} · advantage ${number(episode.advantage)}`),
    el("table", "", el("thead", "", head), el("tbody", "", ...rows)),
    el("details", "", el("summary", "", "task"), el("pre", "", JSON.stringify(group.task, null, 1))),
    agentBox(episode.agent, scale, true),
  );
}

function groupBox(group) {
  const rewards = group.episodes.map((episode) => episode.reward).filter((reward) => reward !== null);
  const [low, high] = [Math.min(0, ...rewards), Math.max(0, ...rewards)];
  const rows = group.episodes.map((episode) => {
    const every = walk(episode.agent);
    const button = el("button", "", `seed ${episode.seed.slice(-6)}`);
    button.type = "button";
    button.title = `seed ${episode.seed}`;
    button.addEventListener("click", () => show(group, episode, button));
    const bar = el("meter");
    [bar.min, bar.max, bar.value] = [low, high > low ? high : low + 1, episode.reward ?? low];
    const turns = every.reduce((sum, agent) => sum + agent.turns.length, 0);
    return el("tr", "", el("td", "", button), el("td", "", number(episode.reward)), el("td", "", bar),
      el("td", "", number(episode.advantage)), el("td", "", `${every.length}`), el("td", "", `${turns}`),
      el("td", "", episode.agent.status));
  });
  const mean = rewards.length ? rewards.reduce((sum, reward) => sum + reward, 0) / rewards.length : null;
  const head = ["", "reward", "", "advantage", "agents", "turns", "status"].map((word) => el("th", "", word));
  const box = el("details", "", el("summary", "", `${group.name} · ${group.env} · mean ${number(mean)}`),
    el("table", "", el("thead", "", el("tr", "", ...head)), el("tbody", "", ...rows)));
  box.open = data.groups.length <= 8;
  return box;
}

const colour = document.getElementById("colour");
function legend() {
  const marks = LEGENDS[colour.value].map(([name, words]) => el("span", name, words || "·"));
  document.getElementById("legend").replaceChildren(...marks);
}
colour.addEventListener("change", () => {
  legend();
  if (shown) show(...shown);
});
legend();
document.title = data.title;
document.getElementById("title").textContent = data.title;
const episodes = data.groups.reduce((sum, group) => sum + group.episodes.length, 0);
const summary = [`${data.groups.length} groups, ${episodes} episodes`, data.findings.length ? "" : "verification found nothing"];
document.getElementById("summary").textContent = summary.filter(Boolean).join(" · ");
if (data.findings.length) {
  const lines = data.findings.slice(0, 1000).map((finding) => el("li", "", finding));
  document.getElementById("summary").after(
    el("details", "alert", el("summary", "", `verification: ${data.findings.length} findings`), el("ul", "", ...lines)));
}
document.getElementById("groups").append(...data.groups.map(groupBox));
const first = document.querySelector("#groups button");
if (first) first.click();
