import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { alg, handle } from '@fleetkey/tpm2/constants.ts'
import { createEk } from '@fleetkey/tpm2/device-keys.ts'
import { OtherEk } from '@fleetkey/tpm2/errors.ts'
import { withPasswords } from '@fleetkey/tpm2/hierarchy.ts'
import { inspectTpm, type TpmReport } from '@fleetkey/tpm2/inspect.ts'
import { spkiOf } from '@fleetkey/tpm2/structures.ts'
import { templates } from '@fleetkey/tpm2/templates.ts'
import { Tpm, type LoadedKey } from '@fleetkey/tpm2/tpm.ts'
import type { Transport } from '@fleetkey/tpm2/transport.ts'
import { pinnedEkOf } from '../bound-keys.ts'
import type { PasswordFiles } from '../config.ts'
import { openDocument } from '../files.ts'
import { nodeFileSystem } from '../filesystem.ts'
import { readPasswords } from '../tpm-passwords.ts'
import { explained } from '../tpm-trouble.ts'
import { readBoard, tpmKind, type BoardFacts, type TpmKind } from './board.ts'
import { ekFindings, type EkFacts } from './ek.ts'
import { fail, messageOf, ok, warn, type Finding } from './finding.ts'
import { eventLogFinding, imaFinding, pcrFinding } from './measured-boot.ts'
import { protections, type Protection } from './protection.ts'
import { tpmFindings } from './tpm.ts'

export interface Patient {
  /** As openTransport takes it. */
  readonly tpm: string
  readonly tpmAuth: PasswordFiles
  /** Folder of the agent's data; null: none is configured, nothing is known of an earlier enrolment. */
  readonly data: string | null
  /** Null: this machine has none. */
  readonly eventLog: string | null
  /** The kernel's list of measured files; null: this machine has none. */
  readonly imaList: string | null
  /** `/`, or a folder that stands for it. */
  readonly root: string
  open(): Promise<Transport>
  random(length: number): Uint8Array
  /** Milliseconds since 1970. */
  readonly now: number
}

export interface Examination {
  /** Nothing failed: the agent can run here. */
  readonly ready: boolean
  readonly tpm: (Omit<TpmReport, 'ekCertificates'> & { readonly kind: TpmKind }) | null
  readonly ekCertificates: readonly EkFacts[]
  readonly board: BoardFacts
  readonly findings: readonly Finding[]
  readonly protections: readonly Protection[]
}

const allPcrs = Array.from({ length: 24 }, (_, pcr) => pcr)

/** The file, null when there is none, or why it cannot be read. */
const look = async (path: string): Promise<Uint8Array | null | Error> => {
  try {
    return new Uint8Array(await readFile(path))
  } catch (thrown) {
    const error = thrown instanceof Error ? thrown : new Error(String(thrown))
    return 'code' in error && (error.code === 'ENOENT' || error.code === 'ENOTDIR') ? null : error
  }
}

/** Makes the EK and the storage root key as the agent will, and forgets them. The EK. */
const tryKeys = async (tpm: Tpm): Promise<LoadedKey> =>
  await tpm.exclusive(
    async () =>
      await withPasswords(tpm, async () => {
        const ek = await createEk(tpm)
        await tpm.flush(ek.handle)
        const srk = await tpm.createPrimary(handle.owner, templates.srk)
        await tpm.flush(srk.handle)
        return ek
      }),
  )

const keysFinding = async (tpm: Tpm, files: PasswordFiles): Promise<{ readonly ek: LoadedKey | null; readonly finding: Finding }> => {
  try {
    return { ek: await tryKeys(tpm), finding: ok('keys', 'the endorsement key and the storage root key can be made') }
  } catch (thrown) {
    const error = await explained(tpm, files, thrown)
    return { ek: null, finding: fail('keys', messageOf(error), 'the agent cannot start before this works') }
  }
}

/** Whether this is the TPM that the agent enrolled with. */
const pinFindings = async (ek: LoadedKey | null, data: string | null): Promise<readonly Finding[]> => {
  if (ek === null || data === null) return []
  try {
    const pin = await pinnedEkOf(openDocument({ files: nodeFileSystem, folder: data, name: 'tpm-keys', step: () => undefined }))
    if (pin === null)
      return [
        ok('EK of this device', 'not enrolled yet: the server compares the EK with its manifest; until then nobody here can tell it from one of an interposer'),
      ]
    if (Buffer.compare(pin, ek.name) === 0) return [ok('EK of this device', 'the one that it enrolled with')]
    return [
      fail(
        'EK of this device',
        messageOf(new OtherEk(pin, ek.name)),
        `look at the bus and at the module; a board whose TPM was replaced is a new device: a manifest that lists it, and an empty ${data}`,
      ),
    ]
  } catch (thrown) {
    return [warn('EK of this device', `what the agent knows of it cannot be read: ${messageOf(thrown)}`, "run doctor as the agent's user")]
  }
}

const measured = async (tpm: Tpm, patient: Patient): Promise<readonly Finding[]> => {
  const values = await tpm.exclusive(async () => await tpm.pcrRead(alg.sha256, allPcrs))
  const ima = patient.imaList === null ? null : await look(join(patient.root, patient.imaList))
  return [
    pcrFinding(values),
    patient.eventLog === null ? ok('event log', 'none, as configured') : eventLogFinding(patient.eventLog, await look(patient.eventLog), values),
    patient.imaList === null ? ok('IMA list', 'none, as configured') : imaFinding(patient.imaList, ima, values),
  ]
}

const examineTpm = async (tpm: Tpm, patient: Patient, known: ReadonlySet<string>): Promise<Examination> => {
  const board = readBoard(patient.root)
  const report = await inspectTpm(tpm)
  const kind = tpmKind(report.manufacturer, board)
  const keys = await keysFinding(tpm, patient.tpmAuth)
  const ek = ekFindings(report, { spki: keys.ek === null ? null : spkiOf(keys.ek.public), now: patient.now })
  const hasBank = report.banks.some(({ hash, pcrs }) => hash === alg.sha256 && pcrs.length > 0)
  const findings = [
    ...tpmFindings(report, { kind, board, spec: patient.tpm, known }),
    ...ek.findings,
    keys.finding,
    ...(await pinFindings(keys.ek, patient.data)),
    ...(hasBank ? await measured(tpm, patient) : []),
  ]
  const { ekCertificates: _, ...rest } = report
  return {
    ready: findings.every(({ grade }) => grade !== 'fail'),
    tpm: { ...rest, kind },
    ekCertificates: ek.facts,
    board,
    findings,
    protections: protections(kind, board),
  }
}

const unreachable = (patient: Patient, finding: Finding): Examination => ({
  ready: false,
  tpm: null,
  ekCertificates: [],
  board: readBoard(patient.root),
  findings: [finding],
  protections: [],
})

/** Looks at the TPM and the measured boot of this machine. Changes nothing; never throws for what it finds, but for an unusable password file (SettingsError). */
export const examine = async (patient: Patient): Promise<Examination> => {
  const passwords = await readPasswords(async (path) => await nodeFileSystem.read(path), patient.tpmAuth)
  let transport: Transport
  try {
    transport = await patient.open()
  } catch (thrown) {
    return unreachable(
      patient,
      fail('TPM', messageOf(thrown), 'see the agent\'s "tpm" setting; on a Raspberry Pi: dtoverlay=tpm-slb9670 in config.txt, then /dev/tpmrm0'),
    )
  }
  const tpm = new Tpm(transport, { random: (length) => patient.random(length), passwords })
  try {
    return await examineTpm(tpm, patient, new Set(Object.keys(passwords)))
  } catch (thrown) {
    const error = await explained(tpm, patient.tpmAuth, thrown)
    return unreachable(patient, fail('TPM', messageOf(error), 'the TPM is there but does not answer as one: dmesg says more; switch the board off and on'))
  } finally {
    for (const secret of Object.values(passwords)) secret.destroy()
    await transport.close().catch(() => undefined)
  }
}
