// SPDX-License-Identifier: Apache-2.0
// Tables of thousands of rows: only those that are looked for become elements, the first hundred of them.
"use strict";
(() => {
  const SHOWN = 100;
  const lists = JSON.parse(document.getElementById("lists").textContent);

  for (const [id, { right, rows }] of Object.entries(lists)) {
    const section = document.getElementById(id);
    const body = section.querySelector("tbody"), search = section.querySelector("input");
    const texts = rows.map((row) => row.join("\t").toLowerCase());

    function show() {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const found = [];
      for (let at = 0; at < texts.length; at++)
        if (words.every((word) => texts[at].includes(word))) found.push(at);
      body.replaceChildren(...found.slice(0, SHOWN).map((at) => {
        const row = document.createElement("tr");
        rows[at].forEach((text, column) => {
          const cell = row.insertCell();
          cell.textContent = text;
          if (right[column]) cell.className = "right";
        });
        return row;
      }));
      const shown = Math.min(found.length, SHOWN);
      section.querySelector(".found").textContent =
        `${found.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")}` +
        (shown < found.length ? `, the first ${shown}` : "");
      section.dataset.found = String(found.length);
    }
    search.addEventListener("input", show);
    show();
  }
})();
