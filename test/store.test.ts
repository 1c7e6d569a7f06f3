import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll } from 'vitest'
import { openMemoryStore } from '@fleetkey/server/store/memory.ts'
import { openSqliteStore } from '@fleetkey/server/store/sqlite.ts'
import { storeConformance } from './conformance/store.ts'

const folder = mkdtempSync(join(tmpdir(), 'fleetkey-store-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))
let count = 0

storeConformance('memory', async () => openMemoryStore())
storeConformance('sqlite', async () => await openSqliteStore(join(folder, String(++count))))
