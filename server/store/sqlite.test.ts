import Database from 'better-sqlite3'
import { spawn, spawnSync, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { generateKeyPairSync, sign } from 'node:crypto'
import { cpSync, mkdirSync, mkdtempSync, readdirSync, renameSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { canonical, emptyLog, extend } from '../audit/chain.ts'
import { checkpointText, signedCheckpoint } from '../audit/checkpoint.ts'
import type { AuditEntry } from '../audit/entry.ts'
import { rootOf } from '../audit/tree.ts'
import { verifyLog } from '../audit/verify.ts'
import type { Changes, Store } from '../flows/context.ts'
import { readMigrations } from './migrate.ts'
import { openSqliteStore } from './sqlite.ts'
import { reserveBytes } from './sqlite/reserve.ts'

let folder: string
const children: ChildProcess[] = []
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'fleetkey-sqlite-'))
})
afterEach(() => {
  for (const child of children.splice(0)) child.kill('SIGKILL')
  rmSync(folder, { recursive: true, force: true })
})

const entry: AuditEntry = { at: 1, caller: 'system:test', from: 'server', action: 'test', subject: 's', outcome: 'done', code: null, detail: '' }
const setting = (id: string, size = 8): Changes => ({
  writes: [{ table: 'setting', do: 'insert', row: { id, version: 0, value: new Uint8Array(size) } }],
  entries: [{ ...entry, detail: id }],
})

/** Every entry follows the one before it, and head and tree are those of the entries. */
const expectWholeLog = async (store: Store): Promise<number> => {
  let head = emptyLog
  for (;;) {
    const page = await store.audit({ after: head.sequence, limit: 1000 })
    for (const one of page) {
      const extended = extend(head, one)
      expect(extended.sequenced).toEqual(one)
      head = extended.head
    }
    if (page.length < 1000) break
  }
  expect(await store.checkpoint()).toEqual({ size: head.sequence, root: rootOf(head.tree), chain: head.chain })
  return head.sequence
}

/** A process of its own with the store open; `code` sees `store`, `setting` and `say`, which returns when the line is out. */
const inChild = (code: string): ChildProcess => {
  const script = `
    import { writeSync } from 'node:fs'
    import { openSqliteStore } from ${JSON.stringify(new URL('./sqlite.ts', import.meta.url).href)}
    const entry = ${JSON.stringify(entry)}
    const setting = (id) => ({ writes: [{ table: 'setting', do: 'insert', row: { id, version: 0, value: new Uint8Array(8) } }], entries: [{ ...entry, detail: id }] })
    const say = (line) => void writeSync(1, line + '\\n')
    let onStep = () => {}
    const store = await openSqliteStore(${JSON.stringify(folder)}, { step: (name) => onStep(name) })
    ${code}
  `
  const child = spawn(process.execPath, ['--input-type=module', '-e', script], { stdio: ['ignore', 'pipe', 'inherit'] })
  children.push(child)
  return child
}

/** What the child has said so far, whole lines. */
const linesOf = (child: ChildProcess): (() => readonly string[]) => {
  let output = ''
  child.stdout?.setEncoding('utf8').on('data', (chunk: string) => (output += chunk))
  return () => output.split('\n').slice(0, -1)
}
const until = async (done: () => boolean): Promise<void> => {
  for (const end = Date.now() + 30_000; !done();) {
    if (Date.now() > end) throw new Error('waited for 30 seconds')
    await sleep(5)
  }
}

test('a second process is refused and told who holds the folder; kill -9 frees it', async () => {
  const child = inChild(`say('open'); setInterval(() => {}, 1000)`)
  const lines = linesOf(child)
  await until(() => lines().length > 0)
  await expect(openSqliteStore(folder)).rejects.toMatchObject({
    code: 'unavailable',
    reason: 'store.locked',
    message: expect.stringContaining(`process ${child.pid}:`) as string,
  })
  child.kill('SIGKILL')
  await once(child, 'exit')
  const store = await openSqliteStore(folder)
  await expect(openSqliteStore(folder)).rejects.toMatchObject({ reason: 'store.locked', message: expect.stringContaining(`process ${process.pid}:`) as string })
  await store.close()
  await (await openSqliteStore(folder)).close()
})

test('kill -9 in the middle of commits loses nothing that was acknowledged', { timeout: 120_000 }, async () => {
  const acknowledged: string[] = []
  for (let round = 0; round < 4; round++) {
    const child = inChild(`
      const worker = async (name) => { for (let i = 0; ; i++) { const id = 'r${round}-' + name + '-' + i; const v = await store.commit(setting(id)); if (v.committed) say(id) } }
      for (let n = 0; n < 20; n++) worker(n)
    `)
    const lines = linesOf(child)
    await until(() => lines().length > 100 + round * 150)
    child.kill('SIGKILL')
    await once(child, 'close')
    acknowledged.push(...lines())
  }
  const store = await openSqliteStore(folder)
  for (const id of acknowledged) expect(await store.get('setting', id)).toMatchObject({ id })
  const size = await expectWholeLog(store)
  // Row and entry are one commit: as many rows as entries, whatever was on its way when the process died.
  expect(size).toBe(await store.count('setting'))
  expect(size).toBeGreaterThanOrEqual(acknowledged.length)
  await store.close()
})

test.each([
  ['store.commit', false],
  ['store.committed', true],
])('killed at step %s: the commit is there: %s', async (step, there) => {
  const child = inChild(`
    await store.commit(setting('first'))
    onStep = (name) => { if (name === ${JSON.stringify(step)}) process.kill(process.pid, 'SIGKILL') }
    await store.commit(setting('second'))
    say('never')
  `)
  const lines = linesOf(child)
  await once(child, 'close')
  expect(lines()).toEqual([])
  const store = await openSqliteStore(folder)
  expect((await store.get('setting', 'second')) !== undefined).toBe(there)
  expect(await expectWholeLog(store)).toBe(there ? 2 : 1)
  await store.close()
})

test('commits queued together share one flush of the disk', async () => {
  const steps: string[] = []
  const store = await openSqliteStore(folder, { step: (name) => void steps.push(name) })
  await Promise.all(Array.from({ length: 100 }, async (_, at) => await store.commit(setting(`s${at}`))))
  expect(steps.filter((name) => name !== 'store.migrated')).toEqual(['store.commit', 'store.committed'])
  // More than one transaction should hold: several groups, in order, none forgotten.
  const verdicts = await Promise.all(Array.from({ length: 2500 }, async (_, at) => await store.commit(setting(`t${at}`))))
  expect(verdicts.map((verdict) => verdict.committed && verdict.sequence)).toEqual(Array.from({ length: 2500 }, (_, at) => 101 + at))
  expect(steps.filter((name) => name !== 'store.migrated').length).toBeLessThan(10)
  await store.close()
})

const editDatabase = (sql: string): void => {
  const db = new Database(join(folder, 'fleetkey.db'))
  db.exec(sql)
  db.close()
}

test.each([
  ['last entry changed', 'DROP TRIGGER audit_log_no_update; UPDATE audit_log SET bytes = zeroblob(9) WHERE sequence = 3'],
  ['last entry dropped', 'DROP TRIGGER audit_log_no_delete; DELETE FROM audit_log WHERE sequence = 3'],
  ['entry added', 'INSERT INTO audit_log SELECT 4, bytes, chain FROM audit_log WHERE sequence = 3'],
  ['head set back', 'UPDATE audit_head SET sequence = 2'],
  ['head gone', 'DELETE FROM audit_head'],
  ['all entries dropped', 'DROP TRIGGER audit_log_no_delete; DELETE FROM audit_log; UPDATE audit_head SET sequence = 1, frontier = zeroblob(32)'],
])('a log that does not fit its head does not open: %s', async (_name, sql) => {
  const store = await openSqliteStore(folder)
  for (const id of ['a', 'b', 'c']) await store.commit(setting(id))
  await store.close()
  editDatabase(sql)
  await expect(openSqliteStore(folder)).rejects.toMatchObject({ code: 'internal', reason: 'store.audit' })
})

/** Five entries, tampered with behind the store's back in a way that opening does not notice; judged as an auditor does. */
const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
const spki = new Uint8Array(publicKey.export({ type: 'spki', format: 'der' }))
const noteOf = async (store: Store): Promise<string> => {
  const head = { origin: 'fleetkey/plant', ...(await store.checkpoint()) }
  return signedCheckpoint(head, { spki, signature: sign('sha256', Buffer.from(checkpointText(head)), privateKey) })
}
const unlocked = 'DROP TRIGGER audit_log_no_update; DROP TRIGGER audit_log_no_delete;'
const forged = Buffer.from(canonical({ ...entry, caller: 'operator:mallory' }, { sequence: 2, previous: new Uint8Array(32) })).toString('hex')
test.each([
  ['untouched', '', null],
  ['an entry replaced', `UPDATE audit_log SET bytes = x'${forged}' WHERE sequence = 2`, 2],
  ['a chain replaced', 'UPDATE audit_log SET chain = zeroblob(32) WHERE sequence = 3', 3],
  ['an entry dropped', 'DELETE FROM audit_log WHERE sequence = 3', 3],
  ['the first entry dropped', 'DELETE FROM audit_log WHERE sequence = 1', 1],
  [
    'two entries swapped',
    'UPDATE audit_log SET sequence = -2 WHERE sequence = 2; UPDATE audit_log SET sequence = 2 WHERE sequence = 3; UPDATE audit_log SET sequence = 3 WHERE sequence = -2',
    2,
  ],
])('tampering in the database is found by verification: %s', async (_name, sql, at) => {
  const store = await openSqliteStore(folder)
  for (const id of ['a', 'b', 'c', 'd', 'e']) await store.commit(setting(id))
  await store.close()
  editDatabase(unlocked + sql)
  const tampered = await openSqliteStore(folder)
  const verdict = verifyLog(await tampered.audit({ after: 0, limit: 10 }), { spki, checkpoint: await noteOf(tampered), kept: [] })
  expect(verdict).toMatchObject({ ok: at === null, sequence: at })
  await tampered.close()
})

test('a log set back to an older state fits itself, and is found by a kept checkpoint', async () => {
  const older = await openSqliteStore(folder)
  for (const id of ['a', 'b', 'c']) await older.commit(setting(id))
  await older.close()
  cpSync(join(folder, 'fleetkey.db'), join(folder, 'backup'))
  const store = await openSqliteStore(folder)
  await store.commit(setting('d'))
  const kept = [await noteOf(store)]
  await store.close()
  cpSync(join(folder, 'backup'), join(folder, 'fleetkey.db'))
  const again = await openSqliteStore(folder)
  const entries = await again.audit({ after: 0, limit: 10 })
  expect(verifyLog(entries, { spki, checkpoint: await noteOf(again), kept: [] })).toMatchObject({ ok: true, entries: 3 })
  expect(verifyLog(entries, { spki, checkpoint: await noteOf(again), kept })).toMatchObject({ ok: false, what: expect.stringContaining('truncated') as string })
  await again.close()
})

test('the log is append only for SQL too', async () => {
  const store = await openSqliteStore(folder)
  await store.commit(setting('a'))
  await store.close()
  expect(() => editDatabase('UPDATE audit_log SET bytes = zeroblob(1)')).toThrow('append only')
  expect(() => editDatabase('DELETE FROM audit_log')).toThrow('append only')
})

test('files are for their owner only; the reserve is kept', async () => {
  const store = await openSqliteStore(join(folder, 'new'))
  expect(statSync(join(folder, 'new')).mode & 0o777).toBe(0o700)
  expect(statSync(join(folder, 'new', 'fleetkey.db')).mode & 0o777).toBe(0o600)
  expect(statSync(join(folder, 'new', 'reserve')).size).toBe(reserveBytes)
  await store.close()
})

/** A small disk of its own; undefined, with the reason printed, where none can be mounted. Root in CI must be able to. */
const smallDisk = (size: string): { path: string; unmount: () => void } | undefined => {
  const path = join(folder, 'disk')
  mkdirSync(path)
  const mounted = process.getuid?.() === 0 ? spawnSync('mount', ['-t', 'tmpfs', '-o', `size=${size}`, 'tmpfs', path], { encoding: 'utf8' }) : undefined
  if (mounted?.status === 0) return { path, unmount: () => void spawnSync('umount', ['-l', path]) }
  const why = mounted === undefined ? 'needs root' : `mount: ${mounted.stderr.trim() || mounted.error?.message}`
  if (process.env['CI'] === 'true' && mounted !== undefined) throw new Error(`cannot mount a small disk: ${why}`)
  process.stderr.write(`NOT RUN: full disk (${why})\n`)
  return undefined
}

test('full disk: ordinary commits are refused, revocations go through, writing returns with space', { timeout: 60_000 }, async ({ skip }) => {
  const disk = smallDisk('16m')
  if (disk === undefined) return skip('no small disk can be mounted here')
  try {
    const lines: string[] = []
    const open = async (): Promise<Store> => await openSqliteStore(join(disk.path, 'data'), { log: (line) => void lines.push(line) })
    let store = await open()
    await store.commit(setting('first'))
    writeFileSync(join(disk.path, 'ballast'), new Uint8Array(6 << 20))

    let committed = 1
    const fill = async (): Promise<unknown> => {
      for (;;) {
        const verdict = await store.commit(setting(`fill-${committed}`, 64 << 10))
        expect(verdict).toMatchObject({ committed: true })
        committed++
      }
    }
    await expect(fill()).rejects.toMatchObject({ code: 'unavailable', reason: 'store.disk' })
    expect(committed).toBeGreaterThan(5)
    expect(store.health()).toMatchObject({ writable: false, reason: expect.stringContaining('full') as string })
    await expect(store.commit(setting('second'))).rejects.toMatchObject({ code: 'unavailable' })
    // What was committed is readable meanwhile, what was refused is not there.
    expect(await store.count('setting')).toBe(committed)
    expect(await store.get('setting', `fill-${committed}`)).toBeUndefined()

    // Really no space: the first of these needs the reserve.
    expect(() => writeFileSync(join(disk.path, 'more'), new Uint8Array(3 << 20))).toThrow('ENOSPC')
    for (let at = 0; at < 100; at++) expect(await store.commit(setting(`revoke-${at}`), { reserved: true })).toMatchObject({ committed: true })
    committed += 100
    await sleep(1500)
    expect(store.health().writable).toBe(false)
    expect(await expectWholeLog(store)).toBe(committed)

    // A restart on the full disk opens, reads, and still revokes.
    await store.close()
    expect(statSync(join(disk.path, 'data', 'reserve')).size).toBe(reserveBytes)
    expect(() => writeFileSync(join(disk.path, 'rest'), new Uint8Array(16 << 20))).toThrow('ENOSPC')
    store = await open()
    expect(await expectWholeLog(store)).toBe(committed)
    await expect(store.commit(setting('second'))).rejects.toMatchObject({ code: 'unavailable' })
    expect(store.health().writable).toBe(false)
    expect(await store.commit(setting('revoke-last'), { reserved: true })).toMatchObject({ committed: true })
    committed++

    for (const name of ['more', 'rest', 'ballast']) rmSync(join(disk.path, name), { force: true })
    await until(() => store.health().writable)
    expect(await store.commit(setting('second'))).toMatchObject({ committed: true })
    expect(await expectWholeLog(store)).toBe(committed + 1)
    expect(statSync(join(disk.path, 'data', 'reserve')).size).toBe(reserveBytes)
    expect(lines.filter((line) => line.includes('works again')).length).toBeGreaterThan(0)
    await store.close()
  } finally {
    disk.unmount()
  }
})

test('a database of before enrolment tokens: opened, brought up to date, nothing lost', async () => {
  const before = await openSqliteStore(folder)
  await before.commit(setting('kept'))
  await before.close()
  // What it holds, in a database as the first migration alone makes it.
  const [path, newer] = [join(folder, 'fleetkey.db'), join(folder, 'newer.db')]
  renameSync(path, newer)
  const [first] = readMigrations(fileURLToPath(new URL('migrations', import.meta.url)))
  const old = new Database(path)
  old.exec(first?.sql ?? '')
  old.exec(`ATTACH '${newer}' AS "newer"`)
  const { sql } = old.prepare('SELECT "sql" FROM "newer"."sqlite_schema" WHERE "name" = \'migration\'').get() as { sql: string }
  old.exec(sql)
  old.exec('INSERT INTO "migration" SELECT * FROM "newer"."migration" WHERE "name" < \'0002\'')
  for (const table of ['setting', 'audit_log', 'audit_head']) old.exec(`INSERT OR REPLACE INTO "${table}" SELECT * FROM "newer"."${table}"`)
  old.close()
  const steps: string[] = []
  const store = await openSqliteStore(folder, { step: (name) => void steps.push(name) })
  expect(steps).toEqual(readdirSync(new URL('migrations', import.meta.url)).flatMap((name) => (name > '0002' ? ['store.migrated'] : [])))
  expect((await store.get('setting', 'kept'))?.id).toBe('kept')
  expect(await store.find('enrolmentToken', { where: { batch: 'b1' }, limit: 1 })).toEqual([])
  await expectWholeLog(store)
  await store.close()
})
