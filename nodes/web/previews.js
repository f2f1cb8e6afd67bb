// What Restore Video needs of the page.
//
// It shows finished frames while it works, and the video once it is done. ComfyUI's page prefers previews to
// results and would go on showing the last frame, so that one is taken away when the result arrives.
import { app } from "../../scripts/app.js";

// What the page names the place for a preview on a node.
const PREVIEW = "$$canvas-image-preview";
// Milliseconds between two looks whether the last preview has been loaded.
const AGAIN = 100;

function showResult(node) {
  if (node.isLoading) {
    // The page loads one thing at a time and forgets what comes meanwhile.
    setTimeout(() => showResult(node), AGAIN);
    return;
  }
  const inSubgraph = node.graph && !node.graph.isRootGraph;
  delete app.nodePreviewImages?.[inSubgraph ? `${node.graph.id}:${node.id}` : `${node.id}`];
  const place = node.widgets?.find((widget) => widget.name === PREVIEW);
  if (place) {
    node.removeWidget(place);
    node.setSize([node.size[0], node.computeSize()[1]]);
  }
  // Makes the page look at the node's results anew.
  node.preview = undefined;
  node.images = undefined;
  node.imgs = undefined;
  node.setDirtyCanvas(true);
}

// The page replaces placeholders such as %date:yyyy-MM-dd% in the prefix of its own nodes only.
function replacePlaceholders(node) {
  const prefix = node.widgets?.find((widget) => widget.name === "filename_prefix");
  const replaced = window.comfyAPI?.utils?.applyTextReplacements;
  if (prefix && replaced) prefix.serializeValue = () => replaced(app, prefix.value);
}

app.registerExtension({
  name: "SeedVR2.RestoreVideo",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== "SVR2RestoreVideo") return;
    const onNodeCreated = nodeType.prototype.onNodeCreated;
    nodeType.prototype.onNodeCreated = function (...created) {
      const result = onNodeCreated?.apply(this, created);
      replacePlaceholders(this);
      return result;
    };
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (...results) {
      onExecuted?.apply(this, results);
      showResult(this);
    };
  },
});
