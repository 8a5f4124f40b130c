// Folds and unfolds the trees of a batch's page, and copies its JSON as it is stored: what the page shows has its hidden
// characters spelled out, and may be shortened.
"use strict";

const BACK_MILLISECONDS = 3000;

function tell(button, text) {
  const title = button.dataset.title ?? button.textContent;
  button.dataset.title = title;
  button.textContent = text;
  document.getElementById("answer").textContent = text; // live updates do not overwrite it
  setTimeout(() => { button.textContent = title; }, BACK_MILLISECONDS);
}

async function rawText(address) {
  const answer = await fetch(address, { credentials: "same-origin" });
  if (!answer.ok) throw new Error(answer.status);
  return answer.text();
}

// For pages without TLS, where browsers have no navigator.clipboard.
function copySelected(text) {
  const field = document.createElement("textarea");
  field.value = text;
  field.setAttribute("readonly", "");
  field.className = "unseen";
  document.body.append(field);
  field.select();
  const isCopied = document.execCommand("copy");
  field.remove();
  if (!isCopied) throw new Error("not copied");
}

async function copy(button) {
  try {
    const text = await rawText(button.closest("[data-raw]").dataset.raw);
    if (navigator.clipboard) await navigator.clipboard.writeText(text);
    else copySelected(text);
    tell(button, "Copied");
  } catch {
    tell(button, "Not copied: open the raw JSON");
  }
  button.focus();
}

for (const button of document.querySelectorAll("[data-fold], [data-copy]")) {
  button.hidden = false;
  button.addEventListener("click", () => {
    if ("copy" in button.dataset) return copy(button);
    for (const details of button.closest("section").querySelectorAll(".tree details")) {
      details.open = button.dataset.fold === "open";
    }
  });
}
