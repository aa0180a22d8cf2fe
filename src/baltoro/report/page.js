// Point at a bar: its turn is shown under the chart. Click: its entry in the list opens. Without script, the list is all there.
const peek = document.getElementById("peek");
const bars = document.querySelectorAll("[data-turn]");
for (const bar of bars) {
  const turn = document.getElementById(bar.dataset.turn);
  if (!turn) continue;
  bar.addEventListener("pointerenter", () => {
    const name = document.createElement("h4");
    name.textContent = turn.parentElement.querySelector("summary b").textContent;
    const copy = turn.cloneNode(true);
    copy.removeAttribute("id");
    peek.replaceChildren(name, copy);
    peek.hidden = false;
  });
  bar.addEventListener("click", () => { turn.parentElement.open = true; });
}
