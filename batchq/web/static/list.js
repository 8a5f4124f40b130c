// Rows of the list of batches: the selection, which stays when rows are replaced, and keys within the list.
"use strict";

(() => {
  const MOST = 200;
  const form = document.getElementById("chosen");
  if (!form) return;
  const list = document.getElementById("list");
  const bar = document.getElementById("chosen-bar");
  const text = document.getElementById("chosen-text");
  const verbs = document.getElementById("chosen-verbs");
  const all = document.getElementById("chosen-all");
  const none = document.getElementById("chosen-none");
  const chosen = new Set();
  let cursor = 0; // the row that had focus last: its place, for when it is gone
  let anchor = ""; // the batch that was selected last: where a range begins

  const boxes = () => [...list.querySelectorAll("input[name=id][type=checkbox]")];
  const rows = () => [...list.querySelectorAll("tbody tr")];
  const linkOf = (row) => row.querySelector("th a");
  const boxOf = (row) => row.querySelector("input[name=id]");

  // Selected batches that are not in the list any more are sent, too.
  function showChosen() {
    if (!bar) return;
    form.querySelectorAll("input[data-absent]").forEach((input) => input.remove());
    const shown = new Set();
    for (const box of boxes()) {
      box.checked = chosen.has(box.value);
      box.closest("tr").classList.toggle("chosen", box.checked);
      shown.add(box.value);
    }
    const absent = [...chosen].filter((id) => !shown.has(id));
    for (const id of absent) {
      const input = document.createElement("input");
      Object.assign(input, { type: "hidden", name: "id", value: id });
      input.dataset.absent = "";
      form.append(input);
    }
    let said = chosen.size ? `${chosen.size} selected` : "None selected";
    if (absent.length) said += `, ${absent.length} of them not shown here any more`;
    if (chosen.size > MOST) said += `; at most ${MOST} can be changed at once`;
    if (text.textContent !== said) text.textContent = said;
    verbs.hidden = none.hidden = !chosen.size;
    all.hidden = !shown.size;
    bar.classList.toggle("has-chosen", chosen.size > 0);
  }

  function choose(id, is) {
    if (is) chosen.add(id);
    else chosen.delete(id);
    anchor = id;
  }

  function chooseRange(to) {
    const shown = boxes();
    const [a, b] = [anchor, to].map((id) => shown.findIndex((box) => box.value === id));
    const from = a < 0 ? b : a;
    for (const box of shown.slice(Math.min(from, b), Math.max(from, b) + 1)) chosen.add(box.value);
    anchor = to;
  }

  function goTo(place) {
    const shown = rows();
    if (!shown.length) return;
    cursor = Math.max(0, Math.min(place, shown.length - 1));
    linkOf(shown[cursor]).focus();
    shown[cursor].scrollIntoView({ block: "nearest" });
  }

  function isWriting(element) {
    return element.isContentEditable || element.matches("textarea, select, input:not([type=checkbox])");
  }

  function keyInList(event) {
    const row = event.target.closest("tr[id]");
    const place = row ? rows().indexOf(row) : -1;
    const moves = { ArrowDown: place + 1, j: place + 1, ArrowUp: place - 1, k: place - 1, Home: 0, End: rows().length };
    if (event.key in moves && !event.shiftKey) {
      goTo(moves[event.key]);
    } else if (event.key.toLowerCase() === "x" && row && boxOf(row)) {
      const box = boxOf(row);
      if (event.shiftKey) chooseRange(box.value);
      else choose(box.value, !chosen.has(box.value));
      showChosen();
    } else if (event.key === "v" && bar && chosen.size) {
      verbs.querySelector("button").focus();
    } else if (event.key === "Escape" && chosen.size) {
      chosen.clear();
      showChosen();
    } else {
      return;
    }
    event.preventDefault();
  }

  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.ctrlKey || event.altKey || event.metaKey || isWriting(event.target)) return;
    if (list.contains(event.target)) keyInList(event);
    else if (event.target === document.body && (event.key === "j" || event.key === "k")) goTo(cursor);
    else if (event.key === "Escape" && bar?.contains(event.target)) goTo(cursor);
  });
  list.addEventListener("focusin", (event) => {
    const place = rows().indexOf(event.target.closest("tr[id]"));
    if (place >= 0) cursor = place;
  });
  list.addEventListener("click", (event) => {
    if (!event.target.matches("input[name=id]")) return;
    if (event.shiftKey && event.target.checked) chooseRange(event.target.value);
    else choose(event.target.value, event.target.checked);
    showChosen();
  });
  all?.addEventListener("click", () => {
    boxes().forEach((box) => choose(box.value, true));
    showChosen();
  });
  none?.addEventListener("click", () => {
    chosen.clear();
    showChosen();
    all.focus();
  });
  // live.js: a piece was replaced. hadFocus: the id of the element in it that had focus.
  document.addEventListener("piecereplaced", (event) => {
    if (event.target.id !== "piece-rows") return;
    showChosen();
    if (event.detail.hadFocus && document.activeElement === document.body) goTo(cursor);
  });
  // What the browser has ticked again, for example after "back".
  const takeTicked = () => {
    boxes().filter((box) => box.checked).forEach((box) => chosen.add(box.value));
    showChosen();
  };
  window.addEventListener("pageshow", takeTicked);
  takeTicked();
  document.getElementById("list-keys").hidden = !rows().length;
})();
