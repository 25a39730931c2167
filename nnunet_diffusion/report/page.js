"use strict";
// Each plane holds the slices that are not shown yet; without this script the page shows the slice with most organs.
for (const plane of document.querySelectorAll(".plane")) {
  const slices = JSON.parse(plane.querySelector("script").textContent);
  const slider = plane.querySelector("input"), output = plane.querySelector("output");
  const scan = plane.querySelector(".scan"), description = scan.alt;
  const show = () => {
    const index = Number(slider.value), place = `${slices.positions[index]} of ${slices.total}`;
    for (const layer of ["scan", "prediction", "reference"]) {
      plane.querySelector("." + layer).src = slices.layers[layer][index];
    }
    output.textContent = place;
    slider.setAttribute("aria-valuetext", "slice " + place);
    scan.alt = description.replace(/slice \d+ of \d+/, "slice " + place);
  };
  slider.addEventListener("input", show);
  plane.querySelector(".stack").addEventListener("wheel", event => {
    if (event.ctrlKey || !event.shiftKey) return; // shift and wheel turn the slices, the wheel alone the page
    event.preventDefault();
    slider.value = Number(slider.value) + Math.sign(event.deltaY || event.deltaX);
    show();
  }, { passive: false });
  show();
}
for (const box of document.querySelectorAll("[data-layer]")) {
  box.addEventListener("change", () => {
    document.body.classList.toggle("hide-" + box.dataset.layer, !box.checked);
    for (const other of document.querySelectorAll(`[data-layer="${box.dataset.layer}"]`)) other.checked = box.checked;
  });
}
const closed = () => document.querySelectorAll("details:not([open])");
addEventListener("beforeprint", () => closed().forEach(d => { d.open = true; d.dataset.print = "1"; }));
addEventListener("afterprint", () => document.querySelectorAll("[data-print]").forEach(d => { d.open = false; delete d.dataset.print; }));
