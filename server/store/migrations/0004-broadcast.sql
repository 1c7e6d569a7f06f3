-- Groups served by broadcast: shards of slots with their sealed masters, and the epochs that were broadcast to them.
CREATE TABLE "shard" (
  "id" TEXT PRIMARY KEY NOT NULL,
  "version" INTEGER NOT NULL,
  "row" BLOB NOT NULL
) STRICT;

CREATE TABLE "broadcast" (
  "id" TEXT PRIMARY KEY NOT NULL,
  "version" INTEGER NOT NULL,
  "row" BLOB NOT NULL
) STRICT;
